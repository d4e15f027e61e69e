#!lua
--[[
Register a connection, make it its user's active one and displace the user's earlier ones.

A known sid is refreshed and keeps its game when it is the same user's and live; otherwise what had the sid is removed
first and reported as replaced (guarantee 4). A detached connection of the user within its grace is resumed: the new one
takes its seat, game and all. Of the user's other connections the expired ones go, then the oldest, until the new one
fits the limit; each of them is reported here and, being gone, nowhere else (guarantee 2). With reject_ms, the register
is refused instead while as many others as the limit allows were seen within that time.

First all is read, then the answer is kept for a call that is sent again, then all is written.

KEYS  conn, user_conns, last_seen, reply
ARGV  key_prefix, sid, user_id, conn_ttl_ms, key_lifetime_ms, connections_per_user,
      reject_ms (0 = the newest wins), server ('' = none), metadata ('' = none, or what it had), events ('' = off)
Reply the epoch, when nothing was displaced, and {epoch, the displaced connection} when one was, in the two usual cases:
      the new connection is in no game, and connected and seen now; otherwise
      {outcome, now ms, the connection (if refused, the newest that is alive), the replaced one if outcome has it, the
      resumed one if outcome has it, the displaced connections, oldest first}
      outcome = 0 refused, or 1 registered + 2 if one was resumed + 4 if one was replaced
      a connection = sid, record (see split_record), score (see find_record)
Cost  O(log N), N = connections in the namespace, for itself and for each connection that it displaces;
      O(S) once, S = servers, where its server is not known any more
Error OOM when the server's memory is full; nothing is changed then
]]
-- @include now_us
-- @include next_epoch
-- @include needs_ttl
-- @include split_record
-- @include make_record
-- @include split_body
-- @include make_body
-- @include split_sids
-- @include make_sids
-- @include drop_connection
-- @include drop_from_user
-- @include has_attached
-- @include is_replaced
-- @include earlier_answer
-- @include answer_once
-- @include event
-- @include publish

local conn_key, user_conns_key, last_seen_key, reply_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local key_prefix, sid, user_id = ARGV[1], ARGV[2], ARGV[3]
local conn_ttl_ms, key_lifetime_ms = tonumber(ARGV[4]), ARGV[5]
local connections_per_user, reject_ms = tonumber(ARGV[6]), tonumber(ARGV[7])
local server, metadata, events = ARGV[8], ARGV[9], ARGV[10]

local time = now_us()
local now = string.sub(time, 1, -4)
local oldest_live_ms = now - conn_ttl_ms

local function is_live(score)
  return tonumber(score) >= oldest_live_ms
end

local function is_detached(score)
  return -score >= tonumber(now)
end

-- Nobody is where the newest wins.
local function is_alive(score)
  return reject_ms > 0 and is_live(score) and tonumber(score) >= now - reject_ms
end

local others = split_sids(redis.call('GET', user_conns_key))
local scores = redis.call('ZMSCORE', last_seen_key, '', sid, unpack(others))
local epoch = next_epoch(scores[1], time)

-- What the connection will be, which of the others stay, and which go: {sid, record, score, game_id, server, user_id}.
local game_id, connected_at, stay, gone, answer = '', epoch == time and '' or now, {}, {}, nil
local replaced, resumed, kept_server

-- Of one that has no record, evicted, nothing is known.
local function find(other, score)
  local record = redis.call('GET', key_prefix .. 'conn:' .. other)
  if not record then
    return nil
  end
  local its_game_id, body = split_record(record)
  local its_user_id, _, _, _, its_server = split_body(body)
  return {other, record, score, its_game_id, its_server, its_user_id}
end

if not scores[2] and epoch == time then
  if #others == 0 then
    answer = epoch
  elseif #others == 1 and connections_per_user == 1 and reject_ms == 0 and tonumber(scores[3] or -1) >= 0 then
    local other = find(others[1], scores[3])
    if other and other[6] == user_id then
      gone[1] = other
      answer = {epoch, other[1], other[2], other[3]}
    end
  end
end

if not answer then
  -- What has the sid now: this user's own connection, which is kept, or one to replace.
  local own = scores[2] and find(sid, scores[2])
  local seat, kept
  if own and own[6] == user_id and (is_live(own[3]) or is_detached(own[3])) then
    kept, seat, kept_server = own, own, own[5]
    resumed = is_detached(own[3]) and own
  else
    replaced = own
  end

  -- The user's other connections, oldest first: how many count, who is alive, whose seat is there to be resumed.
  local count, alive, seat_index = 1, {}, nil
  for index, other in ipairs(others) do
    local score = scores[index + 2] or 0
    if other ~= sid and (is_live(score) or is_detached(score)) then
      count = count + 1
      if is_alive(score) then
        alive[#alive + 1] = index
      elseif is_detached(score) and not kept then
        seat_index = index
      end
    end
  end
  if #alive >= connections_per_user and (resumed or not kept) then
    local newest = alive[#alive]
    local refusing = find(others[newest], scores[newest + 2])
    if refusing then
      return earlier_answer(reply_key) or {0, now, refusing[1], refusing[2], refusing[3]}
    end
    scores[newest + 2] = false -- Its record was evicted, so it is not alive.
  end

  if seat_index then
    local other = find(others[seat_index], scores[seat_index + 2])
    if other and other[6] == user_id then
      resumed, seat = other, other
    end
    count = count - 1
  end
  for index, other in ipairs(others) do
    local score = scores[index + 2] or 0
    local counts = is_live(score) or is_detached(score)
    if other ~= sid and index ~= seat_index then
      if not counts or (count > connections_per_user and not is_alive(score)) then
        -- A record that was evicted may be another user's by now: then only the entry in this list is ours to drop.
        local earlier = find(other, score)
        if earlier and earlier[6] == user_id then
          gone[#gone + 1] = earlier
        end
        if counts then
          count = count - 1
        end
      else
        stay[#stay + 1] = other
      end
    end
  end

  if seat then
    local _, body = split_record(seat[2])
    local _, its_epoch, its_connected_at, _, _, its_metadata = split_body(body)
    game_id = seat[4]
    metadata = metadata ~= '' and metadata or its_metadata
    if kept then
      connected_at = its_connected_at ~= '' and its_connected_at or string.sub(its_epoch, 1, -4)
    end
  end
end

local body = make_body(user_id, epoch, connected_at, '', server, metadata)
local record = make_record(game_id, body)
if not answer then
  answer = {1 + (resumed and 2 or 0) + (replaced and 4 or 0), now, sid, record, now}
  for _, gone_one in ipairs({replaced or {}, resumed or {}, unpack(gone)}) do
    for field = 1, gone_one[1] and 3 or 0 do
      answer[#answer + 1] = gone_one[field]
    end
  end
end
local earlier = answer_once(reply_key, answer)
if earlier then
  return earlier
end

if replaced then
  drop_connection(key_prefix, last_seen_key, sid, replaced[4], replaced[5])
  if replaced[6] ~= user_id then
    drop_from_user(key_prefix, replaced[6], sid, key_lifetime_ms)
  end
end
-- The new connection enters before others go, so that no key is deleted and made again in between.
redis.call('ZADD', last_seen_key, '-' .. epoch, '', now, sid)
if needs_ttl(scores[1], time, conn_ttl_ms) then
  redis.call('PEXPIRE', last_seen_key, key_lifetime_ms)
end
redis.call('SET', conn_key, record, 'PX', key_lifetime_ms)
redis.call('SET', user_conns_key, make_sids(stay) .. #sid .. ':' .. sid, 'PX', key_lifetime_ms)
if game_id ~= '' then
  local game_conns_key = key_prefix .. 'game_conns:' .. game_id
  redis.call('HSET', game_conns_key, sid, body)
  redis.call('PEXPIRE', game_conns_key, key_lifetime_ms)
end
if kept_server and kept_server ~= '' and kept_server ~= server then
  redis.call('SREM', key_prefix .. 'server_conns:' .. kept_server, sid)
end
if server ~= '' then
  local server_conns_key = key_prefix .. 'server_conns:' .. server
  redis.call('SADD', server_conns_key, sid)
  redis.call('PEXPIRE', server_conns_key, key_lifetime_ms)
  -- One that was taken for dead is known again: otherwise nobody would find its connections when it dies.
  local servers_key = key_prefix .. 'servers'
  if redis.call('ZADD', servers_key, 'NX', now, server) == 1 and is_replaced(servers_key, server) then
    redis.call('ZADD', servers_key, '0', server)
  end
  redis.call('PEXPIRE', servers_key, key_lifetime_ms)
end
if resumed and resumed[1] ~= sid then
  drop_connection(key_prefix, last_seen_key, resumed[1], resumed[4], resumed[5])
end
for _, other in ipairs(gone) do
  drop_connection(key_prefix, last_seen_key, other[1], other[4], other[5])
end

if events ~= '' and answer == epoch then
  local message = event('registered', sid, record, now) .. event('user_online', sid, record, now)
  publish(key_prefix, events, key_lifetime_ms, now, {'user:' .. user_id}, message)
elseif events ~= '' then
  local message, channels, was_online = '', {'user:' .. user_id}, false
  local function tell(kind, connection)
    message = message .. event(kind, connection[1], connection[2], connection[3])
    if connection[4] ~= '' then
      channels[#channels + 1] = 'game:' .. connection[4]
    end
  end
  for _, score in ipairs({unpack(scores, 3)}) do
    was_online = was_online or (score and tonumber(score) >= 0)
  end
  if replaced then
    tell('displaced', replaced)
    if replaced[6] ~= user_id then
      channels[#channels + 1] = 'user:' .. replaced[6]
      if tonumber(replaced[3]) >= 0 and not has_attached(key_prefix, last_seen_key, replaced[6], sid) then
        tell('user_offline', replaced)
      end
    end
  end
  for _, other in ipairs(gone) do
    tell('displaced', other)
  end
  tell(resumed and 'resumed' or 'registered', {sid, record, now, game_id})
  if resumed then
    tell('resumed_from', resumed)
  end
  if not was_online then
    tell('user_online', {sid, record, now, ''})
  end
  publish(key_prefix, events, key_lifetime_ms, now, channels, message)
end
return answer
