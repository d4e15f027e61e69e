#!lua flags=allow-oom
--[[
Mark many connections as seen now and keep every key that they live in from expiring.

The TTLs are refreshed by chance, as in heartbeat.

KEYS  last_seen, absent (never there, so that a cluster refuses the call while it moves the slot's keys)
ARGV  key_lifetime_ms (retention_ms more than the TTL of connections), sids (at most 100)
Reply {position of a sid, 0 unknown | -1 expired or past its grace | -2 detached, … for each that was not seen}
Cost  O(log N) for each sid, N = connections in the namespace
]]
-- @include now_ms
-- @include random_number
-- @include refresh_interval_ms
-- @include refresh_ttls

local last_seen_key = KEYS[1]
local key_lifetime_ms = ARGV[1]
local sids = {unpack(ARGV, 2)}
-- @include key_prefix
-- @include conn_ttl_ms

local now_number = tonumber(now_ms)
local seen, seen_count, reply = {}, 0, {}
-- One random number is enough for all.
local chance = random_number
for position, score in ipairs(redis.call('ZMSCORE', last_seen_key, unpack(sids))) do
  local last_seen = score and tonumber(score)
  local is_seen = last_seen and last_seen >= now_number - conn_ttl_ms
  if is_seen then
    chance = chance + (now_number - last_seen) / refresh_interval_ms
    if chance >= 1 then
      chance = chance % 1
      is_seen = refresh_ttls(key_prefix, last_seen_key, sids[position], key_lifetime_ms, now_ms)
      last_seen = is_seen and last_seen
    end
  end
  if is_seen then
    seen[seen_count + 1], seen[seen_count + 2] = now_ms, sids[position]
    seen_count = seen_count + 2
  else
    reply[#reply + 1] = position
    reply[#reply + 1] = not last_seen and 0 or -last_seen < now_number and -1 or -2
  end
end
if seen_count > 0 then
  redis.call('ZADD', last_seen_key, 'XX', unpack(seen))
end
return reply
