#!lua flags=no-writes
--[[
Count the live connections in a game.

KEYS  game_conns, last_seen
ARGV  conn_ttl_ms
Reply the count
Cost  O(M), M = connections in the game; from M = 1000 on O(log N), N = connections in the namespace, unless 1000 of
      these are detached or have expired
]]
-- @include now_ms
-- @include count_members

local game_conns_key, last_seen_key = KEYS[1], KEYS[2]
local conn_ttl_ms = tonumber(ARGV[1])

return count_members(game_conns_key, last_seen_key, false, now_ms(), conn_ttl_ms)
