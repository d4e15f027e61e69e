#!lua flags=allow-oom
--[[
Remove a connection everywhere, or detach it: with a grace, its seat is kept until the grace ends.

A newer connection of the same user is never touched (guarantee 3). Detaching a detached connection again changes
nothing; without a grace it is removed.

KEYS  conn, last_seen, reply
ARGV  key_lifetime_ms (retention_ms more than the TTL of connections), grace_ms (0 = none), epoch ('' = any),
      events ('' = off), keep ('' = only an answer that tells of a change)
Reply {now ms, record (see split_record), score (see find_record)} of the connection, as it was if removed or as it is
      if detached, or {} when there is no live or detached one, or it is not the registration of that epoch
Cost  O(log N), N = connections in the namespace
]]
-- @include now_ms
-- @include find_registration
-- @include answer_nothing
-- @include answer_once

local conn_key, last_seen_key, reply_key = KEYS[1], KEYS[2], KEYS[3]
local key_lifetime_ms, grace_ms, epoch, events = ARGV[1], tonumber(ARGV[2]), ARGV[3] or '', ARGV[4] or ''
local keep = ARGV[5] or ''
-- @include key_prefix
-- @include sid
-- @include conn_ttl_ms

local record, score, is_detached = find_registration(conn_key, last_seen_key, sid, now_ms, conn_ttl_ms, epoch)
if not record then
  return answer_nothing(reply_key, keep, {})
end
if is_detached and grace_ms > 0 then
  return answer_nothing(reply_key, keep, {now_ms, record, score})
end
local told_record, told_score = record, score
if grace_ms > 0 then
  -- @include as_argument
  -- @include detached_record
  told_record, told_score = detached_record(record, score), as_argument(-now_ms - grace_ms)
end
local answer = {now_ms, told_record, told_score}
local earlier = answer_once(reply_key, answer)
if earlier then
  return earlier
end
if grace_ms > 0 then
  -- @include detach_connection
  detach_connection(key_prefix, last_seen_key, key_lifetime_ms, sid, record, told_record, told_score)
else
  -- @include remove_connection
  remove_connection(key_prefix, last_seen_key, key_lifetime_ms, now_ms, sid, record)
end
if events ~= '' then
  -- @include publish_end
  local kind = grace_ms > 0 and 'detached' or 'unregistered'
  publish_end(
    key_prefix, last_seen_key, key_lifetime_ms, events, now_ms, kind, sid, told_record, told_score, not is_detached
  )
end
return answer
