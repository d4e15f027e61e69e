#!lua flags=allow-oom
--[[
Remove one batch of the connections that were not seen for longer than the threshold, or the TTL if that is shorter, of
the detached ones whose grace is over, and of those of dead servers; or only of all those of one server.

A server is dead when it was not seen for longer than the threshold, or another with its id has started since. With a
server_grace_ms its connections are detached, not removed, so that their users can resume them elsewhere (not those that
have expired). With a server its clients fall silent, some of them before it is taken for dead: so a stale one whose
server has missed a heartbeat and a half is detached as well.

A batch that runs after not_after_ms is late and does nothing: something held it up, such as a server that stood
still, and the heartbeats that were sent since then may be held up as well, and run only after it. With a 0 it is always
late: so run_cleanup looks whether the server answers.

What this call removes or detaches no other call can find, so each connection is reported by exactly one caller. An
entry whose record is gone (evicted, or older than its retention) is dropped without a report. A heartbeat that is still
to come, since the clock was set back, counts as one that came now. The batch bounds the time that the script holds the
server (guarantee 7), and so does a bound on what the records hold together; the caller repeats it until it examines
fewer than it asked for.

KEYS  last_seen, servers, reply
ARGV  key_lifetime_ms (retention_ms more than the TTL of connections), threshold_ms, batch_size (at most 1000),
      server_threshold_ms, server_grace_ms (0 = none), server_id ('' = all that is stale or dead), events ('' = off),
      not_after_ms ('' = any time)
Reply {now ms, number examined (batch_size when there may be more; -1 when it is late, and had not run before: that
      counts as the last one), the connections: the stale ones, longest silent first, then those past their grace, then
      those of dead servers; as they were if removed, as they are if detached}
      a connection = sid, record (see split_record), score (see find_record)
Cost  O(log N) for each connection that it removes, detaches or, where the clock was set back, moves to now, N =
      connections in the namespace; O(S) for the S dead servers, or with a server_id, all servers
]]
-- @include now_ms
-- @include as_argument
-- @include dead_servers_limit
-- @include dead_servers
-- @include split_record
-- @include detached_record
-- @include detach_connection
-- @include remove_connection
-- @include earlier_answer
-- @include answer_once
-- @include publish_end

local last_seen_key, servers_key, reply_key = KEYS[1], KEYS[2], KEYS[3]
local key_lifetime_ms, threshold_ms, batch_size = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local server_threshold_ms, server_grace_ms, server_id = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6] or ''
local events, not_after_ms = ARGV[7] or '', ARGV[8] or ''
-- @include key_prefix
-- @include conn_ttl_ms

if not_after_ms ~= '' and tonumber(now_ms) > tonumber(not_after_ms) then
  return earlier_answer(reply_key) or {now_ms, -1}
end

-- A record may hold 4 KiB of metadata and ids as long, and is copied several times: 25 KiB for a batch of 20.
local MAX_BYTES = 1280 * batch_size

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

local function server_of(record)
  local _, _, server = split_record(record)
  return server
end

local function is_to_detach(server, score, found_in_server)
  if server_grace_ms == 0 or server == '' or tonumber(score) < math.max(0, now_ms - conn_ttl_ms) then
    return false
  end
  -- One and a half of the three heartbeats that make the threshold.
  return found_in_server or tonumber(redis.call('ZSCORE', servers_key, server) or 0) < now_ms - server_threshold_ms / 2
end

local has_more = false

-- Where the clock was set back, who has fallen silent would stay alive until it is there again.
local function bring_back(key)
  local ahead = redis.call('ZRANGE', key, '(' .. now_ms, '+inf', 'BYSCORE', 'LIMIT', 0, batch_size)
  for _, member in ipairs(ahead) do
    redis.call('ZADD', key, 'XX', now_ms, member)
  end
  has_more = has_more or #ahead == batch_size
end

if server_id == '' then
  bring_back(last_seen_key)
  bring_back(servers_key)
  find_by_score('0', '(' .. as_argument(now_ms - math.min(threshold_ms, conn_ttl_ms)))
  find_by_score('(-' .. now_ms, '(0')
end
-- Whose list of connections each one of a dead server was found in, by its index in found.
local found_in, emptied = {}, {}
local servers = dead_servers(servers_key, server_id, now_ms, server_threshold_ms)
for _, server in ipairs(servers) do
  local limit = batch_size - #found / 2
  if limit > 0 then
    local sids = redis.call('SRANDMEMBER', key_prefix .. 'server_conns:' .. server, limit)
    local scores = #sids > 0 and redis.call('ZMSCORE', last_seen_key, unpack(sids)) or {}
    for index, sid in ipairs(sids) do
      found[#found + 1] = sid
      found[#found + 1] = scores[index] or '0'
      found_in[#found - 1] = server
    end
    -- One that is alive stays known, for it tells that those before it were replaced.
    local seen = server_id == '' and 0 or tonumber(redis.call('ZSCORE', servers_key, server))
    if #sids < limit and seen < now_ms - server_threshold_ms then
      emptied[#emptied + 1] = server
    end
  end
end
if #found == 0 and #emptied == 0 then
  return earlier_answer(reply_key) or {now_ms, has_more and batch_size or 0}
end

-- It takes at most so many servers at once, and there may be more.
local examined = (has_more or #emptied >= dead_servers_limit) and batch_size or #found / 2
local answer, ends, strays, conn_keys, taken, bytes = {now_ms, examined}, {}, {}, {}, {}, 0
for index = 1, #found, 2 do
  conn_keys[#conn_keys + 1] = key_prefix .. 'conn:' .. found[index]
end
local records = #conn_keys > 0 and redis.call('MGET', unpack(conn_keys)) or {}
for index = 1, #found, 2 do
  local sid, score, record = found[index], found[index + 1], records[(index + 1) / 2]
  bytes = bytes + #sid + (record and #record or 0)
  if bytes > MAX_BYTES and index > 1 then
    -- The rest is for the next batch.
    answer[2], emptied = batch_size, {}
    break
  end
  local server = record and server_of(record)
  if not record or (found_in[index] and found_in[index] ~= server) then
    -- Where records are evicted, a sid may be left in a server's list that is another server's by now.
    strays[#strays + 1] = index
  elseif not taken[sid] then
    -- A connection that is stale and of a dead server is found twice.
    taken[sid] = true
    local ended = {sid = sid, record = record, score = score}
    if is_to_detach(server, score, found_in[index]) then
      ended.attached_record = record
      ended.record, ended.score = detached_record(record, score), as_argument(-now_ms - server_grace_ms)
    end
    ends[#ends + 1] = ended
    answer[#answer + 1], answer[#answer + 2], answer[#answer + 3] = sid, ended.record, ended.score
  end
end
local earlier = answer_once(reply_key, answer)
if earlier then
  return earlier
end

for _, ended in ipairs(ends) do
  local sid, record, score, attached_record = ended.sid, ended.record, ended.score, ended.attached_record
  if attached_record then
    detach_connection(key_prefix, last_seen_key, key_lifetime_ms, sid, attached_record, record, score)
  else
    remove_connection(key_prefix, last_seen_key, key_lifetime_ms, now_ms, sid, record)
  end
  if events ~= '' then
    local kind, was_attached = attached_record and 'detached' or 'expired', attached_record or tonumber(score) >= 0
    publish_end(key_prefix, last_seen_key, key_lifetime_ms, events, now_ms, kind, sid, record, score, was_attached)
  end
end
for _, index in ipairs(strays) do
  if found_in[index] then
    redis.call('SREM', key_prefix .. 'server_conns:' .. found_in[index], found[index])
  end
  if not records[(index + 1) / 2] then
    redis.call('ZREM', last_seen_key, found[index])
  end
end
if #emptied > 0 then
  redis.call('ZREM', servers_key, unpack(emptied))
end
return answer
