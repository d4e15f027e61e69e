-- Keep every key that a connection lives in from expiring, and the last epoch. False when its record was evicted: then
-- nothing of it is left but its entry in last_seen, which goes too.
local function refresh_ttls(key_prefix, last_seen_key, sid, key_lifetime_ms)
  local conn_key = key_prefix .. 'conn:' .. sid
  local record = redis.call('HMGET', conn_key, 'user_id', 'game_id')
  local user_id, game_id = record[1], record[2]
  if not user_id then
    redis.call('ZREM', last_seen_key, sid)
    return false
  end
  redis.call('PEXPIRE', conn_key, key_lifetime_ms)
  redis.call('PEXPIRE', last_seen_key, key_lifetime_ms)
  redis.call('PEXPIRE', key_prefix .. 'epoch', key_lifetime_ms)
  redis.call('PEXPIRE', key_prefix .. 'user_conns:' .. user_id, key_lifetime_ms)
  if game_id ~= '' then
    redis.call('PEXPIRE', key_prefix .. 'game_conns:' .. game_id, key_lifetime_ms)
  end
  return true
end
