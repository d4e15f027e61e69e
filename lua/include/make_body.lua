-- Put the body of a record together; see split_record.
local function make_body(user_id, epoch, connected_at, heartbeat_at, server, metadata)
  local head = epoch
  if server ~= '' or metadata ~= '' then
    head = epoch .. ':' .. connected_at .. ':' .. heartbeat_at .. ':' .. #user_id .. ':' .. #server
  elseif heartbeat_at ~= '' then
    head = epoch .. ':' .. connected_at .. ':' .. heartbeat_at
  elseif connected_at ~= '' then
    head = epoch .. ':' .. connected_at
  end
  return head .. ' ' .. user_id .. server .. metadata
end
