#!lua flags=allow-oom
--[[
Remove a connection from everywhere, or detach it: with a grace its seat is kept until that ends.

A newer connection of the same user is never touched (guarantee 3). A detached connection keeps its record, its place
among its user's connections and its game, but counts nowhere as live: its score in last_seen is minus the end of its
grace, and its last heartbeat moves into the record. To detach it again changes nothing; without a grace it is removed.

KEYS  conn, last_seen, reply
ARGV  key_prefix, sid, epoch ('' = any), grace_ms (0 = none), conn_ttl_ms, key_lifetime_ms
Reply {now ms, the connection, as it was when removed or as it is when detached}, or {} when there is none that is live
      or detached, or it is not the registration of that epoch
      a connection = see read_connection
Cost  O(log N), N = connections in the namespace
]]
-- @include now_ms
-- @include as_argument
-- @include game_entry
-- @include find_connection
-- @include remove_connection
-- @include refresh_ttls
-- @include earlier_answer
-- @include answer_once

local conn_key, last_seen_key, reply_key = KEYS[1], KEYS[2], KEYS[3]
local key_prefix, sid, epoch, grace_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local conn_ttl_ms, key_lifetime_ms = tonumber(ARGV[5]), ARGV[6]

local now = now_ms()
local connection, is_detached = find_connection(conn_key, last_seen_key, sid, now, conn_ttl_ms)
if not connection or (epoch ~= '' and connection[4] ~= epoch) then
  return earlier_answer(reply_key) or {}
end
if is_detached and grace_ms > 0 then
  return earlier_answer(reply_key) or {now, connection}
end
if grace_ms > 0 then
  connection[6], connection[7] = connection[7], as_argument(-now - grace_ms)
end
local answer = {now, connection}
local earlier = answer_once(reply_key, answer)
if earlier then
  return earlier
end
if grace_ms == 0 then
  remove_connection(key_prefix, last_seen_key, connection)
  return answer
end
redis.call('ZADD', last_seen_key, connection[7], sid)
redis.call('HSET', conn_key, 'last_seen', connection[6])
if connection[3] ~= '' then
  redis.call('HSET', key_prefix .. 'game_conns:' .. connection[3], sid, game_entry(connection))
end
-- No heartbeat will do it during the grace, which is at most conn_ttl_ms.
refresh_ttls(key_prefix, last_seen_key, sid, key_lifetime_ms)
return answer
