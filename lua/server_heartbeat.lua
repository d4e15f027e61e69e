#!lua flags=allow-oom
--[[
Mark a game server as seen now.

A server that was taken for dead is known again, and its earlier starts are replaced then, if one came back before it.
One that was replaced by a later start of its id stays dead.

KEYS  servers
ARGV  server ('<boot epoch>:<server_id>'), key_lifetime_ms
Reply 1, or 0 when a later start of the same id has replaced it
Cost  O(log S), S = servers; O(S log S) for one that is not known any more
]]
-- @include now_ms
-- @include replaces_earlier

local servers_key = KEYS[1]
local server, key_lifetime_ms = ARGV[1], ARGV[2]

local score = redis.call('ZSCORE', servers_key, server)
-- Once cleanup has taken all its connections, only the later start itself shows that it was replaced.
if score == '0' or (not score and not replaces_earlier(servers_key, server)) then
  return 0
end
redis.call('ZADD', servers_key, now_ms, server)
redis.call('PEXPIRE', servers_key, key_lifetime_ms)
return 1
