#!lua flags=allow-oom
--[[
Remove one batch of the connections that were not seen for longer than the threshold, or the TTL if that is shorter,
and of the detached ones whose grace is over.

What this call removes no other call can find, so each connection is reported by exactly one caller. An entry whose
record is gone (evicted, or older than its retention) is dropped without a report. The batch bounds the time that the
script holds the server (guarantee 7); the caller repeats it until it examines fewer than it asked for.

KEYS  last_seen, reply
ARGV  key_prefix, threshold_ms, conn_ttl_ms, batch_size (at most 1000)
Reply {now ms, number examined, the removed connections, longest silent first, then those past their grace}
      a connection = see read_connection
Cost  O(log N) for each connection that it removes, N = connections in the namespace
]]
-- @include now_ms
-- @include as_argument
-- @include read_connection
-- @include earlier_answer
-- @include answer_once

local last_seen_key, reply_key = KEYS[1], KEYS[2]
local key_prefix, threshold_ms = ARGV[1], tonumber(ARGV[2])
local conn_ttl_ms, batch_size = tonumber(ARGV[3]), tonumber(ARGV[4])

local now = now_ms()
local oldest_kept_ms = now - math.min(threshold_ms, conn_ttl_ms)
local stale = redis.call(
  'ZRANGE', last_seen_key, '0', '(' .. as_argument(oldest_kept_ms), 'BYSCORE', 'LIMIT', 0, batch_size, 'WITHSCORES'
)
if #stale < 2 * batch_size then
  local past_grace = redis.call(
    'ZRANGE', last_seen_key, '(-' .. now, '(0', 'BYSCORE', 'LIMIT', 0, batch_size - #stale / 2, 'WITHSCORES'
  )
  for _, value in ipairs(past_grace) do
    stale[#stale + 1] = value
  end
end
if #stale == 0 then
  return earlier_answer(reply_key) or {now, 0}
end

local answer, sids, conn_keys = {now, #stale / 2}, {}, {}
for index = 1, #stale, 2 do
  local sid = stale[index]
  local conn_key = key_prefix .. 'conn:' .. sid
  sids[#sids + 1] = sid
  conn_keys[#conn_keys + 1] = conn_key
  answer[#answer + 1] = read_connection(conn_key, sid, stale[index + 1])
end
local earlier = answer_once(reply_key, answer)
if earlier then
  return earlier
end
for index = 3, #answer do
  local sid, user_id, game_id = answer[index][1], answer[index][2], answer[index][3]
  redis.call('ZREM', key_prefix .. 'user_conns:' .. user_id, sid)
  if game_id ~= '' then
    redis.call('HDEL', key_prefix .. 'game_conns:' .. game_id, sid)
  end
end
redis.call('DEL', unpack(conn_keys))
redis.call('ZREM', last_seen_key, unpack(sids))
return answer
