#!lua flags=no-writes
--[[
Count the live connections in a game.

KEYS  game_conns, last_seen
ARGV  conn_ttl_ms
Reply the count
Cost  O(M), M = connections in the game
]]
-- @include now_ms
-- @include last_seen_scores

local game_conns_key, last_seen_key = KEYS[1], KEYS[2]
local conn_ttl_ms = tonumber(ARGV[1])

local oldest_live_ms = now_ms() - conn_ttl_ms
local count = 0
for _, last_seen in ipairs(last_seen_scores(last_seen_key, redis.call('HKEYS', game_conns_key))) do
  if last_seen and tonumber(last_seen) >= oldest_live_ms then
    count = count + 1
  end
end
return count
