#!lua flags=no-writes
--[[
Read the connections in a game, and the position in the stream of events at that moment.

KEYS  game_conns, last_seen, events
ARGV  none
Reply {id of the last entry, number of entries so far, what get_game replies}; '0-0' and 0 when there is no stream
Cost  O(M), M = connections in the game
]]
-- @include now_ms
-- @include read_game
-- @include stream_state

local game_conns_key, last_seen_key, events_key = KEYS[1], KEYS[2], KEYS[3]

local state = stream_state(events_key)
local snapshot = read_game(game_conns_key, last_seen_key)
snapshot[#snapshot + 1] = now_ms
return {state.last_id, state.added, snapshot}
