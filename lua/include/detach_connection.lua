-- @include split_record
-- @include body_of
-- Detach a connection: it keeps its record, its place among its user's connections and its game, but counts nowhere as
-- live, since its score in last_seen is minus the end of its grace.
local function detach_connection(key_prefix, last_seen_key, key_lifetime_ms, sid, record, detached, score)
  local game_id, user_id, server = split_record(record)
  redis.call('ZADD', last_seen_key, score, sid)
  -- No heartbeat will refresh the TTLs during the grace, which is at most conn_ttl_ms.
  redis.call('PEXPIRE', last_seen_key, key_lifetime_ms)
  redis.call('SET', key_prefix .. 'conn:' .. sid, detached, 'PX', key_lifetime_ms)
  redis.call('PEXPIRE', key_prefix .. 'user_conns:' .. user_id, key_lifetime_ms)
  if game_id ~= '' then
    redis.call('HSET', key_prefix .. 'game_conns:' .. game_id, sid, body_of(detached))
    redis.call('PEXPIRE', key_prefix .. 'game_conns:' .. game_id, key_lifetime_ms)
  end
  if server ~= '' then
    redis.call('SREM', key_prefix .. 'server_conns:' .. server, sid)
  end
end
