-- @include split_record
-- @include split_body
-- @include has_attached
-- @include event
-- @include publish
-- Publish that a connection was removed or detached, and with the last one that is not detached, that its user is
-- offline. ended = {sid, record, score}, as they are then or, of one removed, as they were.
local function publish_end(key_prefix, last_seen_key, key_lifetime_ms, events, now, kind, ended, is_attached)
  local game_id, body = split_record(ended[2])
  local user_id = split_body(body)
  local message, channels = event(kind, ended), {'user:' .. user_id}
  if game_id ~= '' then
    channels[2] = 'game:' .. game_id
  end
  if is_attached and not has_attached(key_prefix, last_seen_key, user_id, ended[1]) then
    message = message .. event('user_offline', ended)
  end
  publish(key_prefix, events, key_lifetime_ms, now, channels, message)
end
