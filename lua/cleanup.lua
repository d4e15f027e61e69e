#!lua flags=allow-oom
--[[
Remove one batch of the connections that were not seen for longer than the threshold, or the TTL if that is shorter.

What this call removes no other call can find, so each connection is reported by exactly one caller. An entry whose
record is gone (evicted, or older than its retention) is dropped without a report. The batch bounds the time that the
script holds the server (guarantee 7); the caller repeats it until it examines fewer than it asked for.

KEYS  last_seen
ARGV  key_prefix, threshold_ms, conn_ttl_ms, batch_size (at most 1000)
Reply {now ms, number examined, the removed connections, longest silent first}
      a connection = sid, user_id, game_id or '', connected_at ms, last_seen ms
Cost  O(log N) for each connection that it removes, N = connections in the namespace
]]
-- @include now_ms
-- @include as_argument

local last_seen_key = KEYS[1]
local key_prefix, threshold_ms = ARGV[1], tonumber(ARGV[2])
local conn_ttl_ms, batch_size = tonumber(ARGV[3]), tonumber(ARGV[4])

local now = now_ms()
local oldest_kept_ms = now - math.min(threshold_ms, conn_ttl_ms)
local stale = redis.call(
  'ZRANGE', last_seen_key, '-inf', '(' .. as_argument(oldest_kept_ms), 'BYSCORE', 'LIMIT', 0, batch_size, 'WITHSCORES'
)
local examined = #stale / 2
if examined == 0 then
  return {now, 0}
end

local reply, conn_keys = {now, examined}, {}
local size = 2
for index = 1, #stale, 2 do
  local sid = stale[index]
  local conn_key = key_prefix .. 'conn:' .. sid
  local record = redis.call('HMGET', conn_key, 'user_id', 'game_id', 'connected_at')
  local user_id, game_id = record[1], record[2]
  conn_keys[#conn_keys + 1] = conn_key
  if user_id then
    redis.call('ZREM', key_prefix .. 'user_conns:' .. user_id, sid)
    if game_id ~= '' then
      redis.call('HDEL', key_prefix .. 'game_conns:' .. game_id, sid)
    end
    reply[size + 1], reply[size + 2], reply[size + 3] = sid, user_id, game_id
    reply[size + 4], reply[size + 5] = record[3], stale[index + 1]
    size = size + 5
  end
end
redis.call('DEL', unpack(conn_keys))
redis.call('ZREMRANGEBYRANK', last_seen_key, 0, examined - 1)
return reply
