#!lua flags=no-writes
--[[
Count the live connections in a game.

In a game that is not small, all members are live except those among the namespace's expired and detached connections,
of which cleanups leave few. Asking for the score of each member takes 1 to 2 us.

KEYS  game_conns, last_seen
ARGV  conn_ttl_ms
Reply the count
Cost  O(M), M = connections in the game; if more than 50, O(log N + D), N = connections in the namespace, D = those of
      them that are detached or have expired, unless D reaches M or 1000
]]
-- @include now_ms
-- @include as_argument
-- @include last_seen_scores

local game_conns_key, last_seen_key = KEYS[1], KEYS[2]
local conn_ttl_ms = tonumber(ARGV[1])

local oldest_live_ms = now_ms - conn_ttl_ms
local size = redis.call('HLEN', game_conns_key)
if size > 50 then
  local limit = math.min(size, 1000)
  local newest_other = '(' .. as_argument(oldest_live_ms)
  local others = redis.call('ZRANGE', last_seen_key, '-inf', newest_other, 'BYSCORE', 'LIMIT', 0, limit)
  if #others < limit then
    for _, body in ipairs(#others > 0 and redis.call('HMGET', game_conns_key, unpack(others)) or {}) do
      size = size - (body and 1 or 0)
    end
    return size
  end
end

local count = 0
for _, score in ipairs(last_seen_scores(last_seen_key, redis.call('HKEYS', game_conns_key))) do
  if score and tonumber(score) >= oldest_live_ms then
    count = count + 1
  end
end
return count
