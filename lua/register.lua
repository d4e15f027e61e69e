#!lua
--[[
Register a connection, make it its user's active one and displace the user's earlier ones.

A known sid is refreshed and keeps its game if it is the same user's and live; otherwise what had the sid is removed
first and reported as replaced (guarantee 4). A detached connection of the user within its grace is resumed: the new one
takes its seat, including the game. Of the user's other connections the expired ones go first, then the oldest, until
the new one fits the limit; each is reported here and, being gone, nowhere else (guarantee 2). With resumes, if there is
no detached one, the newest live one that goes is resumed. With reject_ms, the registration is refused instead while as
many others as the limit allows were seen within that time.

The answer is kept with the user's list, which is written anyway. If the list gets another answer or is deleted within a
minute, the answer moves to its own key, reply, so a call that is sent again finds it in one of the two. After the
minute, the next refresh of the list's TTL drops it.

KEYS  conn, user_conns, last_seen, reply
ARGV  key_lifetime_ms (retention_ms more than the TTL of connections), connections_per_user ('' = 1),
      reject_ms ('' = the newest wins), server ('' = none), metadata ('' = none, or what it had), events ('' = off),
      resumes ('' = a detached connection only, 1 = one that it displaces, too),
      keep ('' = a refusal is not kept, see answer_nothing)
Reply '<now us>' as a little-endian double, then what there is to report, as events (see event), in this order: refused
      (the newest connection that is alive, and then nothing else), replaced, resumed_from, displaced (oldest first),
      registered (the new connection itself, but not the usual one, of which the caller knows everything: it is in no
      game, connected now, its epoch is now us, and its metadata is what was passed)
Cost  O(log N), N = connections in the namespace, for itself and for each connection that it displaces;
      O(S log S) once, S = servers, if its server is not known any more
Error OOM when the server's memory is full; nothing is changed then
]]
-- @include now_us
-- @include now_ms

-- Looking it up for each command would take a sixtieth of the whole.
local call = redis.call
local conn_key, user_conns_key, last_seen_key, reply_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local key_lifetime_ms, connections_per_user, reject_ms = ARGV[1], ARGV[2] or '', ARGV[3] or ''
local server, metadata, events, resumes = ARGV[4] or '', ARGV[5] or '', ARGV[6] or '', ARGV[7] or ''
local keep = ARGV[8] or ''
-- @include key_prefix
-- @include sid
local user_id = user_conns_key:sub(#key_prefix + #'user_conns:' + 1)

-- The time in us as a number, to compare and to pack.
local now = now_us + 0
-- @include token_length
-- Eight bytes rather than sixteen digits: every list holds them, and in most that saves a size class of the allocator.
local token, answer = reply_key:sub(-token_length), struct.pack('<d', now)

-- 1. The user's list: its only connection, as in most lists, or all of them; and the kept answer, if it is recent.
local list = call('GET', user_conns_key)
local other, other_length, others, kept = nil, nil, nil, ''
if list then
  local colon = list:find(':', 1, true)
  other_length = list:sub(1, colon - 1)
  local sid_end, kept_at = colon + other_length, nil
  if sid_end == #list then
    other = list:sub(colon + 1)
  elseif list:find('=', sid_end + 1, true) == sid_end + 1 then
    other, kept_at = list:sub(colon + 1, sid_end), sid_end + 2
  else
    -- @include split_sids
    others, kept_at = split_sids(list)
  end
  if kept_at then
    -- @include is_recent
    if is_recent(list, kept_at, now) then
      if list:sub(kept_at, kept_at + token_length - 1) == token then
        return list:sub(kept_at + token_length)
      end
      kept = list:sub(kept_at)
    end
  end
end
if not list or kept ~= '' or reject_ms ~= '' then
  -- Only then can there be an answer under a key of its own: see keep_apart, and the refusal below.
  local earlier = call('GET', reply_key)
  if earlier then
    return earlier
  end
end

-- 2. The usual connection is written at once, without a plan: its sid is free, and its user has no other connection, or
-- one that is connected and goes, as the newest wins. The writes tell whether it is that.
local is_usual, other_score, other_seen = not list, nil, nil
if other and other ~= sid and connections_per_user == '' and reject_ms == '' and resumes == '' then
  other_score = call('ZSCORE', last_seen_key, other)
  other_seen = other_score and other_score + 0
  is_usual = other_score and other_seen >= 0
end
local record, game_id = nil, ''
if is_usual then
  if server == '' and metadata == '' then
    record = '0:' .. now_us .. ' ' .. user_id
  else
    -- @include make_record
    -- @include make_body
    record = make_record('', make_body(user_id, now_us, '', '', server, metadata))
  end
  -- With GET, the reply for a free sid is nil, which costs less than OK.
  is_usual = not call('SET', conn_key, record, 'NX', 'GET', 'PX', key_lifetime_ms)
  if is_usual then
    is_usual = call('ZADD', last_seen_key, 'LT', 'CH', '-' .. now_us, '', now_ms, sid) == 2
    if not is_usual then
      -- Its epoch is not the largest (the clock ran back), or the sid still has a score (its record was evicted): from
      -- here on it is a connection that is registered again.
      call('ZADD', last_seen_key, now_ms, sid)
    end
  end
end

local stay, plan, is_displaced, other_record, other_game_id, other_server = '', nil, false, nil, nil, nil
if is_usual and other then
  local other_key = key_prefix .. 'conn:' .. other
  other_record = call('GETDEL', other_key)
  if other_record then
    -- Most bodies are an epoch of 16 digits and the user's id, and are taken apart here: see split_record.
    local colon = other_record:find(':', 1, true)
    local game_end = colon + other_record:sub(1, colon - 1)
    local epoch_end = other_record:find(' ', game_end + 1, true)
    if epoch_end == game_end + 17 and other_record:sub(epoch_end + 1) == user_id then
      other_game_id, other_server = other_record:sub(colon + 1, game_end), ''
    else
      -- @include split_owned
      other_game_id, other_server = split_owned(other_key, other_record, user_id, key_lifetime_ms)
    end
  end
  -- Nothing is displaced if the record was evicted or is another user's by now.
  is_displaced = other_game_id and true
  if is_displaced then
    -- As event does; but that would format the lengths, which takes longer than the rest.
    answer = answer .. ' displaced ' .. other_length .. '  ' .. other_score .. ' ' .. other .. other_record
  end
elseif not is_usual then
  -- 3. Any other registration has a plan.
  -- @include next_epoch
  -- @include plan_registration
  -- @include conn_ttl_ms
  local epoch = next_epoch(call('ZSCORE', last_seen_key, ''), now_us)
  plan = plan_registration(
    key_prefix, last_seen_key, sid, user_id, others or {other}, now_ms, conn_ttl_ms,
    tonumber(connections_per_user) or 1, tonumber(reject_ms) or 0, resumes ~= '', key_lifetime_ms
  )
  -- @include event
  local refusing, replaced, resumed = plan.refusing, plan.replaced, plan.resumed
  if refusing then
    local refusal = event(answer, 'refused', refusing.sid, refusing.record, refusing.score)
    if keep ~= '' then
      -- As answer_nothing does.
      -- @include kept_ms
      call('SET', reply_key, refusal, 'PX', kept_ms)
    end
    return refusal
  end

  -- 4. The new record, with what it keeps of the connection that it refreshes or whose seat it takes.
  local connected_at, seat = epoch == now_us and '' or now_ms, plan.own or resumed
  if seat then
    -- @include split_record
    local _, _, _, its_epoch, its_connected_at, _, its_metadata = split_record(seat.record)
    metadata = metadata ~= '' and metadata or its_metadata
    if plan.own then
      connected_at = its_connected_at ~= '' and its_connected_at or its_epoch:sub(1, -4)
    end
  end
  -- @include make_record
  -- @include make_body
  game_id = seat and seat.game_id or ''
  local body = make_body(user_id, epoch, connected_at, '', server, metadata)
  record = make_record(game_id, body)

  -- 5. The answer.
  local reported = {answer}
  if replaced then
    reported[#reported + 1] = event('', 'replaced', sid, replaced.record, replaced.score)
  end
  if resumed then
    reported[#reported + 1] = event('', 'resumed_from', resumed.sid, resumed.record, resumed.score)
  end
  for _, gone in ipairs(plan.gone) do
    reported[#reported + 1] = event('', 'displaced', gone.sid, gone.record, gone.score)
  end
  reported[#reported + 1] = event('', 'registered', sid, record, now_ms)
  answer = table.concat(reported)

  -- 6. The writes. What had the sid goes first; the others go last, after the new connection has entered, so that no
  -- key is deleted and made again in between.
  if replaced then
    -- @include drop_from_indexes
    -- @include drop_from_user
    drop_from_indexes(key_prefix, last_seen_key, sid, replaced.game_id, replaced.server)
    if replaced.user_id ~= user_id then
      drop_from_user(key_prefix, replaced.user_id, sid, key_lifetime_ms, now_ms)
    end
  end
  call('SET', conn_key, record, 'PX', key_lifetime_ms)
  call('ZADD', last_seen_key, '-' .. epoch, '', now_ms, sid)
  -- @include make_sids
  stay = make_sids(plan.stay, '')
  if game_id ~= '' then
    local game_conns_key = key_prefix .. 'game_conns:' .. game_id
    call('HSET', game_conns_key, sid, body)
    call('PEXPIRE', game_conns_key, key_lifetime_ms)
  end
  if plan.own and plan.own.server ~= '' and plan.own.server ~= server then
    call('SREM', key_prefix .. 'server_conns:' .. plan.own.server, sid)
  end
end
if kept ~= '' then
  -- @include keep_apart
  keep_apart(key_prefix, kept)
end
-- Most sids have the same length, and formatting a length takes longer than the rest.
local sid_length = other and #other == #sid and other_length or #sid
list = stay .. sid_length .. ':' .. sid .. '=' .. token .. answer

-- 7. The user's list, and what is shared with others: the TTL of last_seen, and the server.
local is_due = true
if is_displaced then
  -- Coming back counts as a heartbeat, which refreshes TTLs by chance.
  -- @include random_number
  -- @include refresh_interval_ms
  is_due = random_number + (now / 1000 - other_seen) / refresh_interval_ms >= 1
end
if is_due then
  call('SET', user_conns_key, list, 'PX', key_lifetime_ms)
  call('PEXPIRE', last_seen_key, key_lifetime_ms)
else
  call('SET', user_conns_key, list, 'KEEPTTL')
end
if server ~= '' then
  -- @include replaces_earlier
  local server_conns_key = key_prefix .. 'server_conns:' .. server
  call('SADD', server_conns_key, sid)
  call('PEXPIRE', server_conns_key, key_lifetime_ms)
  -- A server that was taken for dead is known again: otherwise nobody would find its connections when it dies.
  local servers_key = key_prefix .. 'servers'
  if call('ZADD', servers_key, 'NX', now_ms, server) == 1 and not replaces_earlier(servers_key, server) then
    call('ZADD', servers_key, '0', server)
  end
  call('PEXPIRE', servers_key, key_lifetime_ms)
end

-- 8. Those that go leave the indexes; their records and places in the user's list are gone already.
if is_displaced then
  -- @include drop_from_indexes
  drop_from_indexes(key_prefix, last_seen_key, other, other_game_id, other_server)
elseif plan then
  -- @include drop_from_indexes
  for _, taken in ipairs(plan.taken) do
    drop_from_indexes(key_prefix, last_seen_key, taken.sid, taken.game_id, taken.server)
  end
end

-- 9. The events.
if events ~= '' then
  -- @include event
  -- @include publish
  local channels = {'user:' .. user_id}
  local message
  if is_usual and not other then
    -- Both events describe the same connection, so its text is put together once.
    local registered = event('', 'registered', sid, record, now_ms)
    message = now_ms .. registered .. ' user_online' .. registered:sub(#' registered' + 1)
  else
    local displaced = is_displaced and {
      sid = other, record = other_record, score = other_score, game_id = other_game_id,
    }
    local changes = plan or {gone = {displaced}, was_online = true}
    local connection = {sid = sid, record = record, score = now_ms, game_id = game_id}
    local told = {now_ms}
    -- @include has_attached
    local function tell(kind, of)
      told[#told + 1] = event('', kind, of.sid, of.record, of.score)
      if of.game_id ~= '' then
        channels[#channels + 1] = 'game:' .. of.game_id
      end
    end
    local replaced, resumed = changes.replaced, changes.resumed
    if replaced then
      tell('displaced', replaced)
      if replaced.user_id ~= user_id then
        channels[#channels + 1] = 'user:' .. replaced.user_id
        local was_attached = tonumber(replaced.score) >= 0
        if was_attached and not has_attached(key_prefix, last_seen_key, replaced.user_id) then
          tell('user_offline', replaced)
        end
      end
    end
    for _, gone in ipairs(changes.gone) do
      tell('displaced', gone)
    end
    tell(resumed and 'resumed' or 'registered', connection)
    if resumed then
      tell('resumed_from', resumed)
    end
    if not changes.was_online then
      tell('user_online', connection)
    end
    message = table.concat(told)
  end
  publish(key_prefix, events, key_lifetime_ms, channels, message)
end
return answer
