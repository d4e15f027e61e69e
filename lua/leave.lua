#!lua flags=allow-oom
--[[
Leave the current game.

KEYS  conn, last_seen
ARGV  key_prefix, sid, conn_ttl_ms
Reply the game left, or '' when there is no such live connection or it is in no game
Cost  O(1)
]]
-- @include now_ms
-- @include read_live_connection

local conn_key, last_seen_key = KEYS[1], KEYS[2]
local key_prefix, sid, conn_ttl_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])

local connection = read_live_connection(conn_key, last_seen_key, sid, now_ms() - conn_ttl_ms)
if not connection or connection[3] == '' then
  return ''
end
redis.call('HSET', conn_key, 'game_id', '')
redis.call('HDEL', key_prefix .. 'game_conns:' .. connection[3], sid)
return connection[3]
