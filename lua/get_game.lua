#!lua flags=no-writes
--[[
Read the live connections in a game, all at one moment.

KEYS  game_conns, last_seen
ARGV  conn_ttl_ms
Reply {sid and entry (see game_entry) of each member, in no order, then in the same order the last_seen ms of each, ''
      for one that is not live, then now ms}
Cost  O(M), M = connections in the game
]]
-- @include now_ms
-- @include last_seen_scores

local game_conns_key, last_seen_key = KEYS[1], KEYS[2]
local conn_ttl_ms = tonumber(ARGV[1])

local now = now_ms()
local oldest_live_ms = now - conn_ttl_ms
-- The reply is that of HGETALL, made longer: to build another one of the live members costs more than to send the rest.
local reply = redis.call('HGETALL', game_conns_key)
local sids = {}
for index = 1, #reply, 2 do
  sids[#sids + 1] = reply[index]
end
for _, last_seen in ipairs(last_seen_scores(last_seen_key, sids)) do
  local is_live = last_seen and tonumber(last_seen) >= oldest_live_ms
  reply[#reply + 1] = is_live and last_seen or ''
end
reply[#reply + 1] = now
return reply
