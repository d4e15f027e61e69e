#!lua flags=allow-oom
--[[
Mark a connection as seen now and keep every key that it lives in from expiring.

The TTLs are refreshed about once in 15 minutes, by chance, so that no heartbeat has to ask for a TTL and the
connections of a server do not all refresh theirs together. (The age of the previous heartbeat alone cannot decide it: a
client that beats every 30 seconds would never refresh them.) A full memory does not stop a heartbeat: a player who is
there must not be cleaned up because the server is full.

KEYS  conn, last_seen, absent (never there, so that a cluster refuses the call while it moves the slot's keys)
ARGV  key_lifetime_ms (retention_ms more than the TTL of connections), epoch ('' = any)
Reply 1, or 0 when there is no such live connection, or it is not the registration of that epoch
Cost  O(log N), N = connections in the namespace
]]
-- @include now_ms
-- @include random_number
-- @include refresh_interval_ms

local conn_key, last_seen_key = KEYS[1], KEYS[2]
local key_lifetime_ms, epoch = ARGV[1], ARGV[2] or ''
-- @include sid
-- @include conn_ttl_ms

local last_seen = redis.call('ZSCORE', last_seen_key, sid)
local silence_ms = last_seen and now_ms - last_seen
if not silence_ms or silence_ms > conn_ttl_ms then
  return 0
end
if epoch ~= '' then
  -- @include split_record
  local record = redis.call('GET', conn_key)
  if not record then
    return 0
  end
  local _, _, _, its_epoch = split_record(record)
  if its_epoch ~= epoch then
    return 0
  end
end
if random_number + silence_ms / refresh_interval_ms >= 1 then
  -- @include key_prefix
  -- @include refresh_ttls
  if not refresh_ttls(key_prefix, last_seen_key, sid, key_lifetime_ms, now_ms) then
    return 0
  end
end
redis.call('ZADD', last_seen_key, 'XX', now_ms, sid)
return 1
