#!lua flags=allow-oom
--[[
Mark a connection as seen now and keep every key that it lives in from expiring.

The TTLs are refreshed when a quarter of conn_ttl_ms has passed since they last were, for which key_lifetime_ms allows.
The record's own TTL tells: the keys that it shares with other connections are never refreshed less often. One that is
too long tells of a conn_ttl_ms that was lowered. (The time of the previous heartbeat cannot tell: a client that beats
more often than a quarter would never refresh them.)
A full memory does not stop it: a player who is there must not be cleaned up because the server is full.

KEYS  conn, last_seen
ARGV  key_prefix, sid, epoch ('' = any), conn_ttl_ms, key_lifetime_ms
Reply 1, or 0 when there is no such live connection, or it is not the registration of that epoch
Cost  O(log N), N = connections in the namespace
]]
-- @include now_ms
-- @include split_record
-- @include split_body
-- @include refresh_ttls

local conn_key, last_seen_key = KEYS[1], KEYS[2]
local key_prefix, sid, epoch = ARGV[1], ARGV[2], ARGV[3]
local conn_ttl_ms, key_lifetime_ms = tonumber(ARGV[4]), ARGV[5]

local now = now_ms()
local last_seen = redis.call('ZSCORE', last_seen_key, sid)
if not last_seen or tonumber(last_seen) < now - conn_ttl_ms then
  return 0
end
if epoch ~= '' then
  local _, body = split_record(redis.call('GET', conn_key) or '0:0 ')
  local _, its_epoch = split_body(body)
  if its_epoch ~= epoch then
    return 0
  end
end
local ttl = redis.call('PTTL', conn_key)
if ttl < key_lifetime_ms - conn_ttl_ms / 4 or ttl > tonumber(key_lifetime_ms) then
  if not refresh_ttls(key_prefix, last_seen_key, sid, key_lifetime_ms, now) then
    return 0
  end
end
redis.call('ZADD', last_seen_key, 'XX', now, sid)
return 1
