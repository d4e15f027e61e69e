#!lua flags=no-writes
--[[
Read the connections in each of several games, all at one moment.

KEYS  last_seen, absent (never there, so that a cluster refuses the call while it moves the slot's keys)
ARGV  game_ids (at most 10)
Reply {now ms, for each game what get_game replies, without now ms}
Cost  O(M) for each game, M = connections in the game
]]
-- @include now_ms
-- @include read_game

local last_seen_key = KEYS[1]
local game_ids = {unpack(ARGV, 1)}
-- @include key_prefix

local reply = {now_ms}
for index, game_id in ipairs(game_ids) do
  reply[index + 1] = read_game(key_prefix .. 'game_conns:' .. game_id, last_seen_key)
end
return reply
