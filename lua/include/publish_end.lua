-- @include split_record
-- @include has_attached
-- @include event
-- @include publish
-- Publish that a connection was removed or detached and, if it was the user's last one that was not detached, that the
-- user is offline. record and score are those after it was detached, or before it was removed.
local function publish_end(
  key_prefix, last_seen_key, key_lifetime_ms, events, now_ms, kind, sid, record, score, was_attached
)
  local game_id, user_id = split_record(record)
  local message, channels = event(now_ms, kind, sid, record, score), {'user:' .. user_id}
  if game_id ~= '' then
    channels[2] = 'game:' .. game_id
  end
  if was_attached and not has_attached(key_prefix, last_seen_key, user_id) then
    message = event(message, 'user_offline', sid, record, score)
  end
  publish(key_prefix, events, key_lifetime_ms, channels, message)
end
