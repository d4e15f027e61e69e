#!lua
--[[
Join a game: leave the current one first, if it is another.

A connection that is unknown, expired or detached joins nothing and is not brought back (guarantee 3). One that finds
the game full stays in its current one. The game keeps what a snapshot needs of each member, so that a snapshot need not
open every member's record.

KEYS  conn, game_conns, last_seen, reply
ARGV  key_prefix, sid, game_id, epoch ('' = any), capacity (0 = any number), conn_ttl_ms, key_lifetime_ms
Reply the game left, '' when it left none; 0 when there is no such live connection, or it is not the registration of
      that epoch; 1 when the game is full
Cost  O(1); O(M) when capacity members or more are listed, M = connections in the game
Error OOM when the server's memory is full; nothing is changed then
]]
-- @include now_ms
-- @include game_entry
-- @include find_connection
-- @include has_free_seat
-- @include earlier_answer
-- @include answer_once

local conn_key, game_conns_key, last_seen_key, reply_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local key_prefix, sid, game_id, epoch = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local capacity, conn_ttl_ms, key_lifetime_ms = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]

local now = now_ms()
local connection, is_detached = find_connection(conn_key, last_seen_key, sid, now, conn_ttl_ms)
if not connection or is_detached or (epoch ~= '' and connection[4] ~= epoch) then
  return earlier_answer(reply_key) or 0
end
local current_game_id = connection[3]
if current_game_id == game_id then
  return earlier_answer(reply_key) or ''
end
if capacity > 0 and not has_free_seat(game_conns_key, last_seen_key, capacity, now, conn_ttl_ms) then
  return earlier_answer(reply_key) or 1
end
local earlier = answer_once(reply_key, current_game_id)
if earlier then
  return earlier
end
if current_game_id ~= '' then
  redis.call('HDEL', key_prefix .. 'game_conns:' .. current_game_id, sid)
end
redis.call('HSET', conn_key, 'game_id', game_id)
redis.call('HSET', game_conns_key, sid, game_entry(connection))
redis.call('PEXPIRE', game_conns_key, key_lifetime_ms)
return current_game_id
