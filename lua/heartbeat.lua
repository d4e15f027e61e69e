#!lua flags=allow-oom
--[[
Mark a connection as seen now and keep every key that it lives in from expiring.

The TTLs are refreshed by the first heartbeat in each quarter of conn_ttl_ms, for which key_lifetime_ms allows. (To
refresh when the previous heartbeat is older than a quarter would never refresh for a client that beats more often.)
A full memory does not stop it: a player who is there must not be cleaned up because the server is full.

KEYS  conn, last_seen
ARGV  key_prefix, sid, conn_ttl_ms, key_lifetime_ms
Reply 1, or 0 when there is no such live connection
Cost  O(log N), N = connections in the namespace
]]
-- @include now_ms
-- @include as_argument

local conn_key, last_seen_key = KEYS[1], KEYS[2]
local key_prefix, sid, conn_ttl_ms, key_lifetime_ms = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]

local now = now_ms()
local last_seen = tonumber(redis.call('ZSCORE', last_seen_key, sid) or -1)
if last_seen < now - conn_ttl_ms then
  return 0
end
redis.call('ZADD', last_seen_key, 'XX', as_argument(now), sid)

local refresh_interval = conn_ttl_ms / 4
if math.floor(last_seen / refresh_interval) ~= math.floor(now / refresh_interval) then
  local record = redis.call('HMGET', conn_key, 'user_id', 'game_id')
  redis.call('PEXPIRE', last_seen_key, key_lifetime_ms)
  if record[1] then
    redis.call('PEXPIRE', conn_key, key_lifetime_ms)
    redis.call('PEXPIRE', key_prefix .. 'user_conns:' .. record[1], key_lifetime_ms)
    if record[2] ~= '' then
      redis.call('PEXPIRE', key_prefix .. 'game_conns:' .. record[2], key_lifetime_ms)
    end
  end
end
return 1
