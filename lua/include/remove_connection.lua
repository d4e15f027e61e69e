-- @include split_record
-- @include drop_from_indexes
-- @include drop_from_user
-- Remove a connection from every structure.
local function remove_connection(key_prefix, last_seen_key, key_lifetime_ms, now_ms, sid, record)
  local game_id, user_id, server = split_record(record)
  redis.call('DEL', key_prefix .. 'conn:' .. sid)
  drop_from_indexes(key_prefix, last_seen_key, sid, game_id, server)
  drop_from_user(key_prefix, user_id, sid, key_lifetime_ms, now_ms)
end
