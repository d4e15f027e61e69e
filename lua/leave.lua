#!lua flags=allow-oom
--[[
Leave the current game.

KEYS  conn, last_seen, reply
ARGV  key_prefix, sid, epoch ('' = any), conn_ttl_ms
Reply the game left, or '' when there is no such live connection, it is not the registration of that epoch, or it is in
      no game
Cost  O(1)
]]
-- @include now_ms
-- @include find_connection
-- @include earlier_answer
-- @include answer_once

local conn_key, last_seen_key, reply_key = KEYS[1], KEYS[2], KEYS[3]
local key_prefix, sid, epoch, conn_ttl_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])

local connection, is_detached = find_connection(conn_key, last_seen_key, sid, now_ms(), conn_ttl_ms)
if not connection or is_detached or connection[3] == '' or (epoch ~= '' and connection[4] ~= epoch) then
  return earlier_answer(reply_key) or ''
end
local game_id = connection[3]
local earlier = answer_once(reply_key, game_id)
if earlier then
  return earlier
end
redis.call('HSET', conn_key, 'game_id', '')
redis.call('HDEL', key_prefix .. 'game_conns:' .. game_id, sid)
return game_id
