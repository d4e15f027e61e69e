#!lua flags=no-writes
--[[
Tell which of several users have a connection that was seen within the threshold.

KEYS  last_seen, absent (never there, so that a cluster refuses the call while it moves the slot's keys)
ARGV  threshold_ms (at most the TTL of connections), user_ids (at most 100)
Reply {1 or 0, … for each user}
Cost  O(M) for each user, M = connections of the user, one by default
]]
-- @include now_ms
-- @include split_sids

local last_seen_key = KEYS[1]
local threshold_ms = tonumber(ARGV[1])
local user_ids = {unpack(ARGV, 2)}
-- @include key_prefix

local oldest_online_ms = now_ms - threshold_ms
local reply = {}
for index, user_id in ipairs(user_ids) do
  reply[index] = 0
  local sids = split_sids(redis.call('GET', key_prefix .. 'user_conns:' .. user_id))
  for newest = #sids, 1, -1 do
    local last_seen = redis.call('ZSCORE', last_seen_key, sids[newest])
    if last_seen and tonumber(last_seen) >= oldest_online_ms then
      reply[index] = 1
      break
    end
  end
end
return reply
