#!lua flags=no-writes
--[[
Read the connections in a game, all at one moment.

KEYS  game_conns, last_seen
ARGV  none
Reply {now ms, {sid and entry (see game_entry) of each member, in no order}, {in the same order the score in last_seen
      of each (see read_connection), or nil}}; which of them are live is left to the caller, who has all it takes
Cost  O(M), M = connections in the game
]]
-- @include now_ms
-- @include last_seen_scores

local game_conns_key, last_seen_key = KEYS[1], KEYS[2]

local members = redis.call('HGETALL', game_conns_key)
local sids = {}
for index = 1, #members, 2 do
  sids[#sids + 1] = members[index]
end
return {now_ms(), members, last_seen_scores(last_seen_key, sids)}
