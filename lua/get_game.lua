#!lua flags=no-writes
--[[
Read the connections in a game, all at one moment.

KEYS  game_conns, last_seen
ARGV  none
Reply sid and body (see split_record) of each member, in any order, then in the same order the score in last_seen (see
      find_record) of each, or nil, then now ms; the caller, who has all it takes, decides which of them are live
Cost  O(M), M = connections in the game
]]
-- @include now_ms
-- @include read_game

local game_conns_key, last_seen_key = KEYS[1], KEYS[2]

local snapshot = read_game(game_conns_key, last_seen_key)
snapshot[#snapshot + 1] = now_ms
return snapshot
