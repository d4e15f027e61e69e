-- The record of a connection that is new, so it is in no game, and its epoch is the time at which it connected.
local function new_record(user_id, epoch, server, metadata)
  if server == '' and metadata == '' then
    return '0:' .. epoch .. ' ' .. user_id -- As below, in one step: each string that is made costs time.
  end
  -- @include make_record
  -- @include make_body
  return make_record('', make_body(user_id, epoch, '', '', server, metadata))
end
