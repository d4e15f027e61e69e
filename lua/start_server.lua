#!lua
--[[
Start a game server: give it a boot epoch, and take its earlier starts for dead, which leaves their connections to
cleanup.

KEYS  last_seen, servers, reply
ARGV  server_id, key_lifetime_ms
Reply the boot epoch, larger than every epoch before
Cost  O(S log S), S = servers that were not replaced
Error OOM when the server's memory is full; nothing is changed then
]]
-- @include now_us
-- @include now_ms
-- @include next_epoch
-- @include answer_once
-- @include starts_of

local last_seen_key, servers_key, reply_key = KEYS[1], KEYS[2], KEYS[3]
local server_id, key_lifetime_ms = ARGV[1], ARGV[2]

local epoch = next_epoch(redis.call('ZSCORE', last_seen_key, ''), now_us)
local earlier = answer_once(reply_key, epoch)
if earlier then
  return earlier
end
redis.call('ZADD', last_seen_key, '-' .. epoch, '')
redis.call('PEXPIRE', last_seen_key, key_lifetime_ms)
-- Those that were replaced have a score of 0 already.
for _, start in ipairs(starts_of(servers_key, server_id, '(0')) do
  redis.call('ZADD', servers_key, '0', start)
end
redis.call('ZADD', servers_key, now_ms, epoch .. ':' .. server_id)
redis.call('PEXPIRE', servers_key, key_lifetime_ms)
return epoch
