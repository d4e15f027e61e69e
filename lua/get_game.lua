#!lua flags=no-writes
--[[
Read the live connections in a game, all at one moment.

KEYS  game_conns, last_seen
ARGV  conn_ttl_ms
Reply {now ms, live members, in no order}; a member = sid, its entry (see game_entry), last_seen ms
Cost  O(M), M = connections in the game
]]
-- @include now_ms
-- @include last_seen_scores

local game_conns_key, last_seen_key = KEYS[1], KEYS[2]
local conn_ttl_ms = tonumber(ARGV[1])

local now = now_ms()
local oldest_live_ms = now - conn_ttl_ms
local members = redis.call('HGETALL', game_conns_key)
local sids = {}
for index = 1, #members, 2 do
  sids[#sids + 1] = members[index]
end
local reply, size = {now}, 1
for position, last_seen in ipairs(last_seen_scores(last_seen_key, sids)) do
  if last_seen and tonumber(last_seen) >= oldest_live_ms then
    reply[size + 1], reply[size + 2], reply[size + 3] = sids[position], members[2 * position], last_seen
    size = size + 3
  end
end
return reply
