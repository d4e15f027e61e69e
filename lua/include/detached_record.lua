-- @include split_record
-- @include make_record
-- @include split_body
-- @include make_body
-- The record of a connection once it is detached: the last heartbeat moves into it, and it belongs to no server.
local function detached_record(record, last_seen)
  local game_id, body = split_record(record)
  local user_id, epoch, connected_at, _, _, metadata = split_body(body)
  return make_record(game_id, make_body(user_id, epoch, connected_at, last_seen, '', metadata))
end
