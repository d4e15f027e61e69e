#!lua flags=no-writes
--[[
Read one connection, live or detached.

KEYS  conn, last_seen
ARGV  sid, conn_ttl_ms
Reply {now ms, the connection}, or {} when there is no such connection, live or within its grace
      a connection = see read_connection
Cost  O(1)
]]
-- @include now_ms
-- @include find_connection

local conn_key, last_seen_key = KEYS[1], KEYS[2]
local sid, conn_ttl_ms = ARGV[1], tonumber(ARGV[2])

local now = now_ms()
local connection = find_connection(conn_key, last_seen_key, sid, now, conn_ttl_ms)
return connection and {now, connection} or {}
