-- Take the body of a record apart: user_id, epoch, connected_at, heartbeat_at, server, metadata; '' for none.
-- A body is "<epoch>[:<connected_at ms>[:<last heartbeat ms>[:<length of user id>:<length of server>]]] "
-- and then the user's id, the server and the metadata without anything in between; most have nothing but the user's id.
-- The epoch, the order of all registrations, is a time in us, so connected_at stands there only where it differs: the
-- sid was registered again, or the clock ran back. The last heartbeat stands there of a detached connection only.
local function split_body(body)
  local epoch, more, payload = string.match(body, '^(%d+)(%S*) (.*)$')
  if more == '' then
    return payload, epoch, '', '', '', ''
  end
  local connected_at, heartbeat_at, user, server = string.match(more .. ':::', '^:(%d*):(%d*):(%d*):(%d*)')
  if user == '' then
    return payload, epoch, connected_at, heartbeat_at, '', ''
  end
  local user_end = tonumber(user)
  local server_end = user_end + server
  return string.sub(payload, 1, user_end), epoch, connected_at, heartbeat_at,
    string.sub(payload, user_end + 1, server_end), string.sub(payload, server_end + 1)
end
