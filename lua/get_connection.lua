#!lua flags=no-writes
--[[
Read one connection.

KEYS  conn, last_seen
ARGV  sid, conn_ttl_ms
Reply {the connection, now ms}, or {} when there is no such live connection
      a connection = sid, user_id, game_id or '', connected_at ms, last_seen ms
Cost  O(1)
]]
-- @include now_ms
-- @include read_live_connection

local conn_key, last_seen_key = KEYS[1], KEYS[2]
local sid, conn_ttl_ms = ARGV[1], tonumber(ARGV[2])

local now = now_ms()
local connection = read_live_connection(conn_key, last_seen_key, sid, now - conn_ttl_ms)
if not connection then
  return {}
end
connection[6] = now
return connection
