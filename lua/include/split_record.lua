-- Take a record apart: game_id, user_id, server, epoch, connected_at, heartbeat_at, metadata; '' for none.
-- A record is '<length of the game's id>:<game's id><body>', so it can hold any id, and a game keeps the bodies.
-- A body is '<epoch>[:<connected_at ms>[:<last heartbeat ms>[:<length of user id>:<length of server>]]] '
-- and then the user's id, the server and the metadata without anything in between; most have nothing but the user's id.
-- The epoch, which orders all registrations, is a time in us, so connected_at is there only if it differs: the sid was
-- registered again, or the clock ran back. The last heartbeat is there only for a detached connection.
local function split_record(record)
  local colon = record:find(':', 1, true)
  local game_end = colon + record:sub(1, colon - 1)
  local game_id = record:sub(colon + 1, game_end)
  local epoch, user_at = record:match('^(%d+) ()', game_end + 1)
  if epoch then
    return game_id, record:sub(user_at), '', epoch, '', '', ''
  end
  local more, payload
  epoch, more, payload = record:match('^(%d+)(%S+) (.*)$', game_end + 1)
  local connected_at, heartbeat_at, user, server = (more .. ':::'):match('^:(%d*):(%d*):(%d*):(%d*)')
  if user == '' then
    return game_id, payload, '', epoch, connected_at, heartbeat_at, ''
  end
  local user_end = tonumber(user)
  local server_end = user_end + server
  return game_id, payload:sub(1, user_end), payload:sub(user_end + 1, server_end),
    epoch, connected_at, heartbeat_at, payload:sub(server_end + 1)
end
