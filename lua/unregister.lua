#!lua flags=allow-oom
--[[
Remove a connection from everywhere. A newer connection of the same user is never touched (guarantee 3).

KEYS  conn, last_seen
ARGV  key_prefix, sid, conn_ttl_ms
Reply {the removed connection, now ms}, or {} when there is no such live connection
      a connection = sid, user_id, game_id or '', connected_at ms, last_seen ms
Cost  O(log N), N = connections in the namespace
]]
-- @include now_ms
-- @include read_live_connection
-- @include remove_connection

local conn_key, last_seen_key = KEYS[1], KEYS[2]
local key_prefix, sid, conn_ttl_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])

local now = now_ms()
local connection = read_live_connection(conn_key, last_seen_key, sid, now - conn_ttl_ms)
if not connection then
  return {}
end
remove_connection(key_prefix, conn_key, last_seen_key, sid, connection[2], connection[3])
connection[6] = now
return connection
