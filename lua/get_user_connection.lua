#!lua flags=no-writes
--[[
Read the active connection of a user: of the live ones, the one that registered last.

KEYS  user_conns, last_seen
ARGV  key_prefix, user_id, conn_ttl_ms
Reply {the connection, now ms}, or {} when the user has no live connection
      a connection = sid, user_id, game_id or '', connected_at ms, last_seen ms
Cost  O(M), M = connections of the user, one by default
]]
-- @include now_ms
-- @include read_live_connection

local user_conns_key, last_seen_key = KEYS[1], KEYS[2]
local key_prefix, user_id, conn_ttl_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])

local now = now_ms()
for _, sid in ipairs(redis.call('ZRANGE', user_conns_key, '0', '-1', 'REV')) do
  local connection = read_live_connection(key_prefix .. 'conn:' .. sid, last_seen_key, sid, now - conn_ttl_ms)
  -- Where records are evicted, a sid may be left here that is another user's by now.
  if connection and connection[2] == user_id then
    connection[6] = now
    return connection
  end
end
return {}
