#!lua
--[[
Register a connection, make it its user's active one and displace the user's earlier ones.

A known sid is refreshed and keeps its game when it is the same user's and live; otherwise what had the sid is removed
first and reported as replaced (guarantee 4). Of the user's other connections the expired ones go, then the oldest,
until the new one fits the limit; each of them is reported here and, being gone, nowhere else (guarantee 2).

KEYS  conn, user_conns, last_seen
ARGV  key_prefix, sid, user_id, conn_ttl_ms, key_lifetime_ms, connections_per_user
Reply now ms, when the sid was new and the user had no other connection: then the new one is in no game, and connected
      and seen now; otherwise
      {now ms, replaced 0|1, the connection, [the replaced connection], displaced connections, oldest first}
      a connection = sid, user_id, game_id or '', connected_at ms, last_seen ms
Cost  O(log N), N = connections in the namespace, for itself and for each connection that it displaces
Error OOM when the server's memory is full; nothing is changed then
]]
-- @include now_us
-- @include as_argument
-- @include game_entry
-- @include remove_connection

local conn_key, user_conns_key, last_seen_key = KEYS[1], KEYS[2], KEYS[3]
local key_prefix, sid, user_id = ARGV[1], ARGV[2], ARGV[3]
local conn_ttl_ms, key_lifetime_ms, connections_per_user = tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[6])

local registered_at = now_us()
local now = string.sub(registered_at, 1, -4)
local oldest_live_ms = now - conn_ttl_ms
local game_id, connected_at = '', now
local replaced

-- One command both inserts a new sid and tells a known one.
local is_new = redis.call('ZADD', last_seen_key, 'NX', now, sid) == 1
if not is_new then
  local last_seen = redis.call('ZSCORE', last_seen_key, sid)
  local record = redis.call('HMGET', conn_key, 'user_id', 'game_id', 'connected_at')
  if record[1] == user_id and tonumber(last_seen) >= oldest_live_ms then
    game_id, connected_at = record[2], record[3]
  elseif record[1] then
    remove_connection(key_prefix, conn_key, last_seen_key, sid, record[1], record[2])
    replaced = {sid, record[1], record[2], record[3], last_seen}
  end
  redis.call('ZADD', last_seen_key, now, sid)
end
redis.call('PEXPIRE', last_seen_key, key_lifetime_ms)
redis.call('HSET', conn_key, 'user_id', user_id, 'game_id', game_id, 'connected_at', connected_at)
redis.call('PEXPIRE', conn_key, key_lifetime_ms)

-- The new connection enters before the displaced ones go, so that the key is not deleted and made again in between.
redis.call('ZADD', user_conns_key, registered_at, sid)
redis.call('PEXPIRE', user_conns_key, key_lifetime_ms)
local others = redis.call('ZRANGE', user_conns_key, '0', '-1')
local newest = table.remove(others)
if newest ~= sid then
  -- The clock is behind, as it may be after a failover; the new one is the user's newest nevertheless.
  registered_at = as_argument(redis.call('ZSCORE', user_conns_key, newest) + 1)
  redis.call('ZADD', user_conns_key, registered_at, sid)
  others = redis.call('ZRANGE', user_conns_key, '0', '-2')
end
if is_new and #others == 0 then
  return now
end

if game_id ~= '' then
  local game_conns_key = key_prefix .. 'game_conns:' .. game_id
  redis.call('HSET', game_conns_key, sid, game_entry(registered_at, connected_at, user_id))
  redis.call('PEXPIRE', game_conns_key, key_lifetime_ms)
end
local reply = {now, 0, sid, user_id, game_id, connected_at, now}
if replaced then
  reply[2] = 1
  for _, field in ipairs(replaced) do
    reply[#reply + 1] = field
  end
end
if #others == 0 then
  return reply
end

local last_seen_of, live_count = redis.call('ZMSCORE', last_seen_key, unpack(others)), 1
for index = 1, #others do
  last_seen_of[index] = tonumber(last_seen_of[index] or 0)
  if last_seen_of[index] >= oldest_live_ms then
    live_count = live_count + 1
  end
end
-- They come in the order of their registration, so of the live ones the oldest meet the limit first.
for index, other in ipairs(others) do
  local is_live = last_seen_of[index] >= oldest_live_ms
  if live_count > connections_per_user or not is_live then
    if is_live then
      live_count = live_count - 1
    end
    local other_key = key_prefix .. 'conn:' .. other
    local record = redis.call('HMGET', other_key, 'user_id', 'game_id', 'connected_at')
    if record[1] == user_id then
      remove_connection(key_prefix, other_key, last_seen_key, other, user_id, record[2])
      local size = #reply
      reply[size + 1], reply[size + 2], reply[size + 3] = other, user_id, record[2]
      reply[size + 4], reply[size + 5] = record[3], last_seen_of[index]
    else
      -- The record was evicted, and may be another user's by now: only this entry is ours to drop.
      redis.call('ZREM', user_conns_key, other)
    end
  end
end
return reply
