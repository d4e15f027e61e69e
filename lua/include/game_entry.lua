-- What a game keeps of a member: '<epoch>[:<connected_at ms>[:<last heartbeat ms>]] <user_id>'. The epoch, the order of
-- all registrations, is a time in us, so connected_at stands there only where it differs: the sid was registered again,
-- or the clock ran back. The last heartbeat stands there of a detached connection only.
local function game_entry(connection)
  local user_id, epoch, connected_at, heartbeat_at = connection[2], connection[4], connection[5], connection[6]
  if heartbeat_at ~= '' then
    return epoch .. ':' .. connected_at .. ':' .. heartbeat_at .. ' ' .. user_id
  end
  if connected_at ~= '' then
    return epoch .. ':' .. connected_at .. ' ' .. user_id
  end
  return epoch .. ' ' .. user_id
end
