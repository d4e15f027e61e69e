#!lua flags=no-writes
--[[
Count the live connections of the namespace.

KEYS  last_seen
ARGV  conn_ttl_ms
Reply the count
Cost  O(log N), N = connections in the namespace
]]
-- @include now_ms
-- @include as_argument

local last_seen_key = KEYS[1]
local conn_ttl_ms = tonumber(ARGV[1])

return redis.call('ZCOUNT', last_seen_key, as_argument(now_ms - conn_ttl_ms), '+inf')
