#!lua
--[[
Join a game, leaving the current one first if it is another.

A connection that is unknown, expired or detached joins nothing and is not brought back (guarantee 3). One that finds
the game full stays in its current game. A game keeps what a snapshot needs of each member, so that a snapshot need not
open every member's record.

KEYS  conn, game_conns, last_seen, reply
ARGV  key_lifetime_ms (retention_ms more than the TTL of connections), capacity ('' = any number), epoch ('' = any),
      events ('' = off), keep ('' = only an answer that tells of a change)
Reply the game left ('' for none) when it is in the game now; else a number: 0 when there is no such live connection, or
      it is not the registration of that epoch; 1 when the game is full
Cost  O(1); O(M) when capacity members or more are listed, M = connections in the game
Error OOM when the server's memory is full; nothing is changed then
]]
-- @include now_ms
-- @include find_registration
-- @include split_record
-- @include body_of
-- @include make_record
-- @include answer_nothing
-- @include answer_once

local conn_key, game_conns_key, last_seen_key, reply_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local key_lifetime_ms, capacity, epoch, events = ARGV[1], ARGV[2] or '', ARGV[3] or '', ARGV[4] or ''
local keep = ARGV[5] or ''
-- @include key_prefix
-- @include sid
-- @include conn_ttl_ms
local game_id = game_conns_key:sub(#key_prefix + #'game_conns:' + 1)

local record, score, is_detached = find_registration(conn_key, last_seen_key, sid, now_ms, conn_ttl_ms, epoch)
if not record or is_detached then
  return answer_nothing(reply_key, keep, 0)
end
local left_game_id, user_id = split_record(record)
if left_game_id == game_id then
  return answer_nothing(reply_key, keep, '')
end
if capacity ~= '' then
  -- @include has_free_seat
  if not has_free_seat(game_conns_key, last_seen_key, tonumber(capacity), now_ms, conn_ttl_ms) then
    return answer_nothing(reply_key, keep, 1)
  end
end
local earlier = answer_once(reply_key, left_game_id)
if earlier then
  return earlier
end
local body = body_of(record)
local joined = make_record(game_id, body)
redis.call('SET', conn_key, joined, 'KEEPTTL')
redis.call('HSET', game_conns_key, sid, body)
redis.call('PEXPIRE', game_conns_key, key_lifetime_ms)
if left_game_id ~= '' then
  redis.call('HDEL', key_prefix .. 'game_conns:' .. left_game_id, sid)
end
if events ~= '' then
  -- @include event
  -- @include publish
  local message, channels = now_ms, {'user:' .. user_id, 'game:' .. game_id}
  if left_game_id ~= '' then
    message, channels[3] = event(now_ms, 'left', sid, record, score), 'game:' .. left_game_id
  end
  message = event(message, 'joined', sid, joined, score)
  publish(key_prefix, events, key_lifetime_ms, channels, message)
end
return left_game_id
