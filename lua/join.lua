#!lua
--[[
Join a game: leave the current one first, if it is another.

A connection that is unknown or expired joins nothing and is not brought back (guarantee 3). The game keeps what a
snapshot needs of each member, so that a snapshot need not open every member's record.

KEYS  conn, game_conns, last_seen
ARGV  key_prefix, sid, game_id, conn_ttl_ms, key_lifetime_ms
Reply the game left, '' when it left none, or 0 when there is no such live connection
Cost  O(1)
Error OOM when the server's memory is full; nothing is changed then
]]
-- @include now_ms
-- @include game_entry
-- @include read_live_connection

local conn_key, game_conns_key, last_seen_key = KEYS[1], KEYS[2], KEYS[3]
local key_prefix, sid, game_id = ARGV[1], ARGV[2], ARGV[3]
local conn_ttl_ms, key_lifetime_ms = tonumber(ARGV[4]), ARGV[5]

local connection = read_live_connection(conn_key, last_seen_key, sid, now_ms() - conn_ttl_ms)
if not connection then
  return 0
end
local user_id, current_game_id, connected_at = connection[2], connection[3], connection[4]
if current_game_id == game_id then
  return ''
end
-- Where keys are evicted it may be gone, and a script must not fail between its writes.
local registered_at = redis.call('ZSCORE', key_prefix .. 'user_conns:' .. user_id, sid) or connected_at .. '000'
if current_game_id ~= '' then
  redis.call('HDEL', key_prefix .. 'game_conns:' .. current_game_id, sid)
end
redis.call('HSET', conn_key, 'game_id', game_id)
redis.call('HSET', game_conns_key, sid, game_entry(registered_at, connected_at, user_id))
redis.call('PEXPIRE', game_conns_key, key_lifetime_ms)
return current_game_id
