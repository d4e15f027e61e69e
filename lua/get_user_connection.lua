#!lua flags=no-writes
--[[
Read the active connection of a user: of the live ones, the one that registered last.

KEYS  user_conns, last_seen
ARGV  key_prefix, user_id, conn_ttl_ms
Reply {now ms, the connection}, or {} when the user has no live connection
      a connection = see read_connection
Cost  O(M), M = connections of the user, one by default
]]
-- @include now_ms
-- @include find_connection

local user_conns_key, last_seen_key = KEYS[1], KEYS[2]
local key_prefix, user_id, conn_ttl_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])

local now = now_ms()
for _, sid in ipairs(redis.call('ZRANGE', user_conns_key, '0', '-1', 'REV')) do
  local connection, is_detached = find_connection(key_prefix .. 'conn:' .. sid, last_seen_key, sid, now, conn_ttl_ms)
  -- Where records are evicted, a sid may be left here that is another user's by now.
  if connection and not is_detached and connection[2] == user_id then
    return {now, connection}
  end
end
return {}
