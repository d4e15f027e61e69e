#!lua flags=allow-oom
--[[
Leave the current game.

KEYS  conn, last_seen, reply
ARGV  key_prefix, sid, conn_ttl_ms, key_lifetime_ms, epoch ('' = any), events ('' = off)
Reply the game left, or '' when there is no such live connection, it is not the registration of that epoch, or it is in
      no game
Cost  O(1)
]]
-- @include now_ms
-- @include find_record
-- @include split_record
-- @include body_of
-- @include make_record
-- @include earlier_answer
-- @include answer_once

local conn_key, last_seen_key, reply_key = KEYS[1], KEYS[2], KEYS[3]
local key_prefix, sid, conn_ttl_ms, key_lifetime_ms = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local epoch, events = ARGV[5] or '', ARGV[6] or ''

local record, score, is_detached = find_record(conn_key, last_seen_key, sid, now_ms, conn_ttl_ms)
if not record or is_detached then
  return earlier_answer(reply_key) or ''
end
local game_id, user_id, _, its_epoch = split_record(record)
if game_id == '' or (epoch ~= '' and its_epoch ~= epoch) then
  return earlier_answer(reply_key) or ''
end
local earlier = answer_once(reply_key, game_id)
if earlier then
  return earlier
end
redis.call('SET', conn_key, make_record('', body_of(record)), 'KEEPTTL')
redis.call('HDEL', key_prefix .. 'game_conns:' .. game_id, sid)
if events ~= '' then
  -- @include event
  -- @include publish
  local channels = {'user:' .. user_id, 'game:' .. game_id}
  publish(key_prefix, events, key_lifetime_ms, channels, event(now_ms, 'left', sid, record, score))
end
return game_id
