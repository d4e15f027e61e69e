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
-- @include make_record
-- @include split_body
-- @include earlier_answer
-- @include answer_once

local conn_key, last_seen_key, reply_key = KEYS[1], KEYS[2], KEYS[3]
local key_prefix, sid, conn_ttl_ms, key_lifetime_ms = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local epoch, events = ARGV[5] or '', ARGV[6] or ''

local now = now_ms()
local record, score, is_detached = find_record(conn_key, last_seen_key, sid, now, conn_ttl_ms)
local game_id, body, user_id, its_epoch = '', nil, nil, nil
if record and not is_detached then
  game_id, body = split_record(record)
  user_id, its_epoch = split_body(body)
end
if game_id == '' or (epoch ~= '' and its_epoch ~= epoch) then
  return earlier_answer(reply_key) or ''
end
local earlier = answer_once(reply_key, game_id)
if earlier then
  return earlier
end
redis.call('SET', conn_key, make_record('', body), 'KEEPTTL')
redis.call('HDEL', key_prefix .. 'game_conns:' .. game_id, sid)
if events ~= '' then
  -- @include event
  -- @include publish
  local channels = {'user:' .. user_id, 'game:' .. game_id}
  publish(key_prefix, events, key_lifetime_ms, now, channels, event('left', sid, record, score))
end
return game_id
