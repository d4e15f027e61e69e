#!lua
--[[
Replace the metadata of a connection.

KEYS  conn, last_seen, reply
ARGV  key_lifetime_ms (retention_ms more than the TTL of connections), metadata ('' = none), epoch ('' = any),
      events ('' = off), keep ('' = only an answer that tells of a change)
Reply 1, or 0 when there is no such live connection, or it is not the registration of that epoch
Cost  O(1)
Error OOM when the server's memory is full; nothing is changed then
]]
-- @include now_ms
-- @include find_registration
-- @include split_record
-- @include make_record
-- @include make_body
-- @include answer_nothing
-- @include answer_once

local conn_key, last_seen_key, reply_key = KEYS[1], KEYS[2], KEYS[3]
local key_lifetime_ms, metadata, epoch, events = ARGV[1], ARGV[2] or '', ARGV[3] or '', ARGV[4] or ''
local keep = ARGV[5] or ''
-- @include key_prefix
-- @include sid
-- @include conn_ttl_ms

local record, score, is_detached = find_registration(conn_key, last_seen_key, sid, now_ms, conn_ttl_ms, epoch)
if not record or is_detached then
  return answer_nothing(reply_key, keep, 0)
end
local game_id, user_id, server, its_epoch, connected_at, _, its_metadata = split_record(record)
if its_metadata == metadata then
  return answer_nothing(reply_key, keep, 1)
end
local earlier = answer_once(reply_key, 1)
if earlier then
  return earlier
end
local body = make_body(user_id, its_epoch, connected_at, '', server, metadata)
record = make_record(game_id, body)
redis.call('SET', conn_key, record, 'KEEPTTL')
if game_id ~= '' then
  redis.call('HSET', key_prefix .. 'game_conns:' .. game_id, sid, body)
  -- The key is new if the game was evicted.
  redis.call('PEXPIRE', key_prefix .. 'game_conns:' .. game_id, key_lifetime_ms)
end
if events ~= '' then
  -- @include event
  -- @include publish
  local channels = {'user:' .. user_id}
  if game_id ~= '' then
    channels[2] = 'game:' .. game_id
  end
  publish(key_prefix, events, key_lifetime_ms, channels, event(now_ms, 'metadata_updated', sid, record, score))
end
return 1
