#!lua flags=no-writes
--[[
Count the live connections in a game.

KEYS  game_conns, last_seen
ARGV  conn_ttl_ms
Reply the count
Cost  O(M), M = connections in the game; of more than 50 O(log N + D), N = connections in the namespace, D = those of
      them that are detached or have expired, unless these are as many as M, or 1000
]]
-- @include now_ms
-- @include count_members

local game_conns_key, last_seen_key = KEYS[1], KEYS[2]
local conn_ttl_ms = tonumber(ARGV[1])

return count_members(game_conns_key, last_seen_key, false, now_ms(), conn_ttl_ms)
