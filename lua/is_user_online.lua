#!lua flags=no-writes
--[[
Tell whether a user has a connection that was seen within the threshold, or within the TTL if that is shorter.

KEYS  user_conns, last_seen
ARGV  threshold_ms, conn_ttl_ms
Reply 1 or 0
Cost  O(M), M = connections of the user, one by default
]]
-- @include now_ms

local user_conns_key, last_seen_key = KEYS[1], KEYS[2]
local threshold_ms, conn_ttl_ms = tonumber(ARGV[1]), tonumber(ARGV[2])

local oldest_online_ms = now_ms() - math.min(threshold_ms, conn_ttl_ms)
for _, sid in ipairs(redis.call('ZRANGE', user_conns_key, '0', '-1')) do
  local last_seen = redis.call('ZSCORE', last_seen_key, sid)
  if last_seen and tonumber(last_seen) >= oldest_online_ms then
    return 1
  end
end
return 0
