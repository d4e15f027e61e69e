-- Append an event to a message: ' <kind> <length of the sid> <length of the record> <score> ', then the sid and the
-- record of the connection, as it is now or, if it is gone or has left, as it was. The last event of a message may
-- leave out the record's length: then the rest is the record.
local function event(message, kind, sid, record, score)
  return message .. ' ' .. kind .. ' ' .. #sid .. ' ' .. #record .. ' ' .. score .. ' ' .. sid .. record
end
