-- @include split_record
-- @include split_body
-- Keep every key that a connection lives in from expiring. False when its record was evicted: then nothing of it is
-- left but its entry in last_seen, which goes too.
local function refresh_ttls(key_prefix, last_seen_key, sid, key_lifetime_ms)
  local conn_key = key_prefix .. 'conn:' .. sid
  local record = redis.call('GET', conn_key)
  if not record then
    redis.call('ZREM', last_seen_key, sid)
    return false
  end
  local game_id, body = split_record(record)
  local user_id, _, _, _, server = split_body(body)
  redis.call('PEXPIRE', conn_key, key_lifetime_ms)
  redis.call('PEXPIRE', last_seen_key, key_lifetime_ms)
  redis.call('PEXPIRE', key_prefix .. 'user_conns:' .. user_id, key_lifetime_ms)
  if game_id ~= '' then
    redis.call('PEXPIRE', key_prefix .. 'game_conns:' .. game_id, key_lifetime_ms)
  end
  if server ~= '' then
    redis.call('PEXPIRE', key_prefix .. 'server_conns:' .. server, key_lifetime_ms)
  end
  return true
end
