#!lua flags=allow-oom
--[[
Remove one batch of the connections that have not been seen for longer than the threshold (or the TTL, if that is
shorter), of the detached ones whose grace is over, and of those of dead servers; or, with a server_id, of all
connections of that server, or of its starts up to newest_start.

A server is dead when it has not been seen for longer than server_threshold_ms, or another with its id has started
since. With a server_grace_ms its connections are detached, not removed (unless they have expired), so that their users
can resume them elsewhere. Clients fall silent together with their server, some before it is taken for dead, so a stale
connection whose server has missed a heartbeat and a half is detached as well.

A batch that runs after not_after_ms is late and does nothing: what held it up, such as a server that stood still, may
also have held up the heartbeats sent since then, which then run only after it. With 0 it is always late: that is how
run_cleanup looks whether the server answers.

No other call can find what this call removes or detaches, so each connection is reported by exactly one caller. An
entry whose record is gone (evicted, or older than its retention) is dropped without a report. A heartbeat that lies in
the future, because the clock was set back, counts as one that came now (a batch that is sent again sees to that, too).
The batch size bounds the time that the script holds the server (guarantee 7), and so does a limit on the bytes of the
records; the caller repeats it until it examines fewer than it asked for.

KEYS  last_seen, servers, reply
ARGV  key_lifetime_ms (retention_ms more than the TTL of connections), threshold_ms, batch_size (at most 1000),
      server_threshold_ms, server_grace_ms (0 = none), server_id ('' = all that is stale or dead),
      newest_start ('' = every start of it), events ('' = off), not_after_ms ('' = any time),
      keep ('' = only an answer that tells of a change)
Reply {now ms, number examined (batch_size when there may be more; -1 when the batch is late and had not run before,
      which counts as the last one), the connections: the stale ones, longest silent first, then those past their grace,
      then those of dead servers; as they were if removed, as they are if detached}
      a connection = sid, record (see split_record), score (see find_record)
Cost  O(log N) for each connection that it removes, detaches or, if the clock was set back, moves to now, N =
      connections in the namespace; O(S) for the S dead servers, or with a server_id, all servers
]]
-- @include now_ms
-- @include as_argument
-- @include starts_of
-- @include split_record
-- @include detached_record
-- @include detach_connection
-- @include remove_connection
-- @include answer_once
-- @include answer_nothing
-- @include publish_end

local last_seen_key, servers_key, reply_key = KEYS[1], KEYS[2], KEYS[3]
local key_lifetime_ms, threshold_ms, batch_size = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local server_threshold_ms, server_grace_ms, server_id = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6] or ''
local newest_start, events, not_after_ms, keep = ARGV[7] or '', ARGV[8] or '', ARGV[9] or '', ARGV[10] or ''
-- @include key_prefix
-- @include conn_ttl_ms

if not_after_ms ~= '' and tonumber(now_ms) > tonumber(not_after_ms) then
  local earlier = answer_nothing(reply_key, keep, {now_ms, -1})
  return earlier[2] == -1 and {now_ms, -1} or earlier
end

-- A record may hold 4 KiB of metadata and ids just as long, and is copied several times: 25 KiB for a batch of 20.
local most_bytes = 1280 * batch_size
-- The caller repeats the batch until nothing is left.
local most_dead_servers, most_starts = 10, 100

-- What may have to go: {sid, score, server} by these names, with the server only if it was found in a server's list.
local found = {}

local function find_by_score(oldest, newest)
  local limit = batch_size - #found
  if limit > 0 then
    local range = redis.call('ZRANGE', last_seen_key, oldest, newest, 'BYSCORE', 'LIMIT', 0, limit, 'WITHSCORES')
    for index = 1, #range, 2 do
      found[#found + 1] = {sid = range[index], score = range[index + 1]}
    end
  end
end

local function is_to_detach(server, score, is_of_dead_server)
  if server_grace_ms == 0 or server == '' or tonumber(score) < math.max(0, now_ms - conn_ttl_ms) then
    return false
  end
  -- One and a half of the three heartbeats that make the threshold.
  return is_of_dead_server
    or tonumber(redis.call('ZSCORE', servers_key, server) or 0) < now_ms - server_threshold_ms / 2
end

local has_more = false

-- If the clock was set back, what has fallen silent would otherwise stay alive until the clock has caught up.
local function bring_back(key)
  local ahead = redis.call('ZRANGE', key, '(' .. now_ms, '+inf', 'BYSCORE', 'LIMIT', 0, batch_size)
  for _, member in ipairs(ahead) do
    redis.call('ZADD', key, 'XX', now_ms, member)
  end
  has_more = has_more or #ahead == batch_size
end

-- 1. The stale ones and those past their grace, then those of dead servers: not seen for longer than the threshold, or
-- replaced by a later start of the same id, which leaves a score of 0.
local servers
if server_id == '' then
  bring_back(last_seen_key)
  bring_back(servers_key)
  find_by_score('0', '(' .. as_argument(now_ms - math.min(threshold_ms, conn_ttl_ms)))
  find_by_score('(-' .. now_ms, '(0')
  local oldest_alive = '(' .. as_argument(now_ms - server_threshold_ms)
  servers = redis.call('ZRANGE', servers_key, '0', oldest_alive, 'BYSCORE', 'LIMIT', 0, most_dead_servers)
else
  servers = starts_of(servers_key, server_id, '0', tonumber(newest_start))
end
local emptied = {}
for number = 1, math.min(#servers, most_starts) do
  local server, limit = servers[number], batch_size - #found
  if limit > 0 then
    local sids = redis.call('SRANDMEMBER', key_prefix .. 'server_conns:' .. server, limit)
    local scores = #sids > 0 and redis.call('ZMSCORE', last_seen_key, unpack(sids)) or {}
    for index, sid in ipairs(sids) do
      found[#found + 1] = {sid = sid, score = scores[index] or '0', server = server}
    end
    -- A live server stays known: it tells that its earlier starts were replaced.
    local is_dead = server_id == ''
      or tonumber(redis.call('ZSCORE', servers_key, server)) < now_ms - server_threshold_ms
    if is_dead and #sids < limit then
      emptied[#emptied + 1] = server
    end
  end
end
if #found == 0 and #emptied == 0 then
  return answer_nothing(reply_key, keep, {now_ms, has_more and batch_size or 0})
end

-- 2. What becomes of each, and the answer.
local examined = (has_more or #emptied >= most_dead_servers) and batch_size or #found
local answer, ends, strays, conn_keys, taken, bytes = {now_ms, examined}, {}, {}, {}, {}, 0
for index, one in ipairs(found) do
  conn_keys[index] = key_prefix .. 'conn:' .. one.sid
end
local records = #conn_keys > 0 and redis.call('MGET', unpack(conn_keys)) or {}
for index, one in ipairs(found) do
  local sid, score, record = one.sid, one.score, records[index]
  bytes = bytes + #sid + (record and #record or 0)
  if bytes > most_bytes and index > 1 then
    -- The rest is for the next batch.
    answer[2], emptied = batch_size, {}
    break
  end
  local server = record and select(3, split_record(record))
  if not record or (one.server and one.server ~= server) then
    -- If records are evicted, a server's list may still hold a sid that is another server's by now.
    one.has_record = record
    strays[#strays + 1] = one
  elseif not taken[sid] then
    -- A connection that is stale and of a dead server is found twice.
    taken[sid] = true
    local ended = {sid = sid, record = record, score = score}
    if is_to_detach(server, score, one.server) then
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

-- 3. The writes.
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
for _, stray in ipairs(strays) do
  if stray.server then
    redis.call('SREM', key_prefix .. 'server_conns:' .. stray.server, stray.sid)
  end
  if not stray.has_record then
    redis.call('ZREM', last_seen_key, stray.sid)
  end
end
if #emptied > 0 then
  redis.call('ZREM', servers_key, unpack(emptied))
end
return answer
