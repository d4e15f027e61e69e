#!lua flags=allow-oom
--[[
Remove one batch of the connections that were not seen for longer than the threshold, or the TTL if that is shorter, of
the detached ones whose grace is over, and of those of dead servers; or only of all those of one server.

A server is dead when it was not seen for longer than the threshold, or another with its id has started since. With a
server_grace_ms its connections are detached, not removed, so that their users can resume them elsewhere.

What this call removes or detaches no other call can find, so each connection is reported by exactly one caller. An
entry whose record is gone (evicted, or older than its retention) is dropped without a report. The batch bounds the time
that the script holds the server (guarantee 7); the caller repeats it until it examines fewer than it asked for.

KEYS  last_seen, servers, reply
ARGV  key_prefix, threshold_ms, conn_ttl_ms, key_lifetime_ms, batch_size (at most 1000), server_threshold_ms,
      server_grace_ms (0 = none), server_id ('' = all that is stale or dead), events ('' = off)
Reply {now ms, number examined, the connections: the removed ones, longest silent first, then those past their grace,
      then those of dead servers, removed, or detached as they are now}
      a connection = sid, record (see split_record), score (see find_record)
Cost  O(log N) for each connection that it removes, N = connections in the namespace; O(S) for the S dead servers, or
      with a server_id, all servers
]]
-- @include now_ms
-- @include as_argument
-- @include dead_servers
-- @include detached_record
-- @include detach_connection
-- @include remove_connection
-- @include earlier_answer
-- @include answer_once
-- @include publish_end

local last_seen_key, servers_key, reply_key = KEYS[1], KEYS[2], KEYS[3]
local key_prefix, threshold_ms, conn_ttl_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local key_lifetime_ms, batch_size, server_threshold_ms = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local server_grace_ms, server_id, events = tonumber(ARGV[7]), ARGV[8], ARGV[9]

local now = now_ms()
-- sid and score, one after the other.
local found = {}

local function find_by_score(oldest, newest)
  if 2 * batch_size > #found then
    local limit = batch_size - #found / 2
    for _, value in ipairs(
      redis.call('ZRANGE', last_seen_key, oldest, newest, 'BYSCORE', 'LIMIT', 0, limit, 'WITHSCORES')
    ) do
      found[#found + 1] = value
    end
  end
end

if server_id == '' then
  find_by_score('0', '(' .. as_argument(now - math.min(threshold_ms, conn_ttl_ms)))
  find_by_score('(-' .. now, '(0')
end
local of_servers = #found + 1
local emptied = {}
for _, server in ipairs(dead_servers(servers_key, server_id, now, server_threshold_ms)) do
  local limit = batch_size - #found / 2
  if limit > 0 then
    local sids = redis.call('SRANDMEMBER', key_prefix .. 'server_conns:' .. server, limit)
    local scores = #sids > 0 and redis.call('ZMSCORE', last_seen_key, unpack(sids)) or {}
    for index, sid in ipairs(sids) do
      found[#found + 1] = sid
      found[#found + 1] = scores[index] or '0'
    end
    if #sids < limit then
      emptied[#emptied + 1] = server
    end
  end
end
if #found == 0 and #emptied == 0 then
  return earlier_answer(reply_key) or {now, 0}
end

local answer, ends, strays, conn_keys, taken = {now, #found / 2}, {}, {}, {}, {}
for index = 1, #found, 2 do
  conn_keys[#conn_keys + 1] = key_prefix .. 'conn:' .. found[index]
end
local records = #conn_keys > 0 and redis.call('MGET', unpack(conn_keys)) or {}
for index = 1, #found, 2 do
  local sid, score, record = found[index], found[index + 1], records[(index + 1) / 2]
  if not record then
    strays[#strays + 1] = sid
  elseif not taken[sid] then
    -- A connection that is stale and of a dead server is found twice.
    taken[sid] = true
    local ended = {sid, record, score}
    if index >= of_servers and server_grace_ms > 0 then
      ended = {sid, detached_record(record, score), as_argument(-now - server_grace_ms), record}
    end
    ends[#ends + 1] = ended
    answer[#answer + 1], answer[#answer + 2], answer[#answer + 3] = ended[1], ended[2], ended[3]
  end
end
local earlier = answer_once(reply_key, answer)
if earlier then
  return earlier
end

for _, ended in ipairs(ends) do
  local sid, told_record, told_score, record = ended[1], ended[2], ended[3], ended[4]
  if record then
    detach_connection(key_prefix, last_seen_key, key_lifetime_ms, sid, record, told_record, told_score)
  else
    remove_connection(key_prefix, last_seen_key, key_lifetime_ms, sid, told_record)
  end
  if events ~= '' then
    local kind, was_attached = record and 'detached' or 'expired', record or tonumber(told_score) >= 0
    publish_end(key_prefix, last_seen_key, key_lifetime_ms, events, now, kind, ended, was_attached)
  end
end
if #strays > 0 then
  redis.call('ZREM', last_seen_key, unpack(strays))
end
if #emptied > 0 then
  redis.call('ZREM', servers_key, unpack(emptied))
end
return answer
