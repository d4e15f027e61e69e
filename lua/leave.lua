#!lua flags=allow-oom
--[[
Leave the current game.

KEYS  conn, last_seen, reply
ARGV  key_lifetime_ms (retention_ms more than the TTL of connections), epoch ('' = any), events ('' = off),
      keep ('' = only an answer that tells of a change)
Reply the game left, or '' when there is no such live connection, it is not the registration of that epoch, or it is in
      no game
Cost  O(1)
]]
-- @include now_ms
-- @include find_registration
-- @include split_record
-- @include body_of
-- @include make_record
-- @include answer_nothing
-- @include answer_once

local conn_key, last_seen_key, reply_key = KEYS[1], KEYS[2], KEYS[3]
local key_lifetime_ms, epoch, events, keep = ARGV[1], ARGV[2] or '', ARGV[3] or '', ARGV[4] or ''
-- @include key_prefix
-- @include sid
-- @include conn_ttl_ms

local record, score, is_detached = find_registration(conn_key, last_seen_key, sid, now_ms, conn_ttl_ms, epoch)
if not record or is_detached then
  return answer_nothing(reply_key, keep, '')
end
local game_id, user_id = split_record(record)
if game_id == '' then
  return answer_nothing(reply_key, keep, '')
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
